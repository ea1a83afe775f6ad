"""The formulas of csrc/math and of sam_kernels/backends/triton/math have the same names; only text is read.

csrc/math/X.h                               sam_kernels/backends/triton/math/X.py
------------------------------------------  ---------------------------------------------------------------
struct S with data members                  class S(NamedTuple), the same fields in the same order
struct S without data members               no class
method m of S                               function <s>_m, with <s> for S in snake_case; first `self` when
                                            S has data members, then the same argument names in order
operator() of S                             function apply_<s>, arguments as of a method
free function f, SAMK_HD or SAMK_HD_CALL    function f, the same argument names in order
overloads of one name                       one function with the arguments of the longest; those that the
                                            shortest lacks have a default, and no others
template parameters that are types          trailing upper-case arguments annotated tl.constexpr (METRIC,
                                            SHAPE); these and any others of that kind are not compared
static constants                            nothing

On the Python side only functions under @triton.jit and NamedTuple classes count, and none whose name begins
with an underscore. A C++ argument without use has its name in a comment: `V /*w*/`. Whatever else is on one
side only is an error.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP = ROOT / "csrc" / "math"
TRITON = ROOT / "sam_kernels" / "backends" / "triton" / "math"


@dataclass
class Names:
    """What one file offers: fields by class; by function its arguments and which of them may be left out."""

    classes: dict[str, list[str]] = field(default_factory=dict)
    functions: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)


# ---- C++ ----

NO_NAMES = set("const volatile signed unsigned void bool char short int long float double".split())
NO_FIELD = re.compile(r"((constexpr\s+)?static|using|typedef|friend|enum|struct|class)\b")


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def split(text: str, at: str = ",") -> list[str]:
    """Split at each `at` that is inside no brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "(<[{") - (c in ")>]}")
        if c == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def closing(text: str, begin: int) -> int:
    """Return where the bracket that opens at `begin` closes."""
    pair = {"{": "{}", "(": "()", "<": "<>"}[text[begin]]
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"{text[begin]} is never closed: {text[begin : begin + 60]!r}")


def argument(text: str) -> str:
    """Return the name of one C++ argument, or ? and the argument where it has none."""
    words = re.findall(r"\w+|[^\w\s]", split(text, "=")[0])
    has_type = any(word.isidentifier() and word not in {"const", "volatile"} for word in words[:-1])
    is_name = has_type and words[-1].isidentifier() and words[-1] not in NO_NAMES
    return words[-1] if is_name else f"?{text}"


def declarations(text: str):
    """Yield (head, body) of what stands at one level; body is None where there is no {...}."""
    at = 0
    while at < len(text):
        end = re.compile(r"[;{(]").search(text, at)
        if end is None:
            break
        i = end.start()
        if text[i] == "(":  # up to the body or semicolon that ends the declaration
            i = re.compile(r"[;{]").search(text, closing(text, i)).start()
        head = text[at:i].strip()
        if text[i] == ";":
            yield head, None
            at = i + 1
            continue
        close = closing(text, i)
        yield head, text[i + 1 : close]
        at = close + 1


def without_template(head: str) -> str:
    head = head.lstrip("; \n")
    while head.startswith("template"):
        head = head[closing(head, head.index("<")) + 1 :].strip()
    return head


def arguments_of(head: str) -> tuple[str, list[str]]:
    """Return a C++ function's name and its arguments' names."""
    found = re.search(r"(operator\s*\(\s*\)|\w+)\s*\(", head)
    begin = found.end() - 1
    inside = head[begin + 1 : closing(head, begin)]
    return re.sub(r"\s", "", found.group(1)), [argument(part) for part in split(inside)]


def cpp_names(text: str) -> Names:
    text = re.sub(r"/\*\s*(\w+)\s*\*/(?=\s*[,)])", r"\1", text)  # the name of an argument without use
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.M)
    names, overloads = Names(), {}

    def see(name: str, arguments: list[str], owner: str) -> None:
        group = overloads.setdefault(name, {"owner": owner, "lists": []})
        if group["owner"] != owner:
            raise ValueError(f"two things are called {name}: of {group['owner']} and of {owner}")
        group["lists"].append(arguments)

    def level(text: str) -> None:
        for head, body in declarations(text):
            head = without_template(head)
            if re.match(r"(inline\s+)?namespace\b", head) and body is not None:
                level(body)
            elif found := re.match(r"(?:struct|class)\s+(\w+)", head):
                if body is not None:
                    structure(found.group(1), body)
            elif "(" in head and re.match(r"SAMK_HD(_CALL)?\b", head):
                see(*arguments_of(head), owner="the namespace")

    def structure(name: str, body: str) -> None:
        fields, methods = [], []
        for head, _ in declarations(body):
            head = re.sub(r"^\s*(public|private|protected)\s*:", "", without_template(head)).strip()
            if "(" in split(head, "=")[0]:
                methods.append(arguments_of(head))
            elif head and not NO_FIELD.match(head):
                fields += [re.findall(r"\w+", split(part, "=")[0])[-1] for part in split(head)]
        if fields:
            names.classes[name] = fields
        for method, arguments in methods:
            called = f"apply_{snake(name)}" if method == "operator()" else f"{snake(name)}_{method}"
            see(called, ["self"] * bool(fields) + arguments, owner=name)

    level(text)
    for name, group in overloads.items():
        longest, shortest = max(group["lists"], key=len), min(group["lists"], key=len)
        for arguments in group["lists"]:
            if arguments != [a for a in longest if a in arguments]:
                raise ValueError(f"{name}({', '.join(arguments)}) is no part of ({', '.join(longest)})")
        names.functions[name] = (longest, [a for a in longest if a not in shortest])
    return names


# ---- Python ----


def python_names(text: str) -> Names:
    names = Names()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if any(ast.unparse(base).split(".")[-1] == "NamedTuple" for base in node.bases):
                names.classes[node.name] = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if any(ast.unparse(d).split("(")[0] == "triton.jit" for d in node.decorator_list):
                names.functions[node.name] = python_arguments(node.args)
    return names


def python_arguments(args: ast.arguments) -> tuple[list[str], list[str]]:
    positional = [*args.posonlyargs, *args.args]
    optional = [a.arg for a in positional[len(positional) - len(args.defaults) :]]
    optional += [a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default]
    every = [*positional, *args.kwonlyargs]
    while every and every[-1].arg.isupper() and is_constant(every[-1]):
        every.pop()
    kept = [a.arg for a in every]
    return kept, [name for name in kept if name in optional]


def is_constant(argument: ast.arg) -> bool:
    return argument.annotation is not None and ast.unparse(argument.annotation) == "tl.constexpr"


# ---- the comparison ----


def differences(cpp: str, python: str) -> list[str]:
    """Return a sentence for each thing that one of two source texts has and the other has not."""
    ours, theirs = cpp_names(cpp), python_names(python)
    found = []
    for kind, left, right in [
        ("class", ours.classes, theirs.classes),
        ("function", ours.functions, theirs.functions),
    ]:
        found += [f"{kind} {name}: in C++ only" for name in left if name not in right]
        found += [f"{kind} {name}: in Python only" for name in right if name not in left]
    for name in ours.classes.keys() & theirs.classes.keys():
        if ours.classes[name] != theirs.classes[name]:
            fields = f"{ours.classes[name]} in C++, {theirs.classes[name]} in Python"
            found.append(f"class {name}: fields {fields}")
    for name in ours.functions.keys() & theirs.functions.keys():
        (left, left_out), (right, right_out) = ours.functions[name], theirs.functions[name]
        if left != right:
            found.append(f"function {name}: arguments {left} in C++, {right} in Python")
        elif left_out != right_out:
            found.append(f"function {name}: {left_out} can be left out in C++, {right_out} in Python")
    return found


STEMS = sorted({p.stem for p in CPP.glob("*.h")} | {p.stem for p in TRITON.glob("*.py")} - {"__init__"})


@pytest.mark.parametrize("stem", STEMS)
def test_both_sides_have_the_same_names(stem):
    cpp, python = CPP / f"{stem}.h", TRITON / f"{stem}.py"
    missing = [str(path.relative_to(ROOT)) for path in (cpp, python) if not path.exists()]
    assert not missing
    assert not differences(cpp.read_text(), python.read_text())


def test_the_formulas_are_found():
    names = {path.stem: cpp_names(path.read_text()) for path in CPP.glob("*.h")}
    assert names["metric"].classes == {"Adaptive": ["eta"], "Fisher": ["eta"], "Power": ["peak", "q"]}
    assert names["metric"].functions["euclidean_weigh"] == (["u", "d", "w"], [])
    assert names["normal"].functions["normal_pair"] == (["a", "b"], [])
    assert names["metric"].functions["apply_power"] == (["self", "u"], [])
    assert names["descent"].functions["sgd_weight"] == (["self", "w", "g", "buf"], ["buf"])
    assert names["perturb"].classes["Perturb"] == ["scale", "metric", "shape"]
    assert names["power"].functions == {"power": (["x", "e"], [])}
    assert names["random"].functions["random_word"] == (["seed", "step", "tensor", "element"], [])


# ---- that the comparison can fail ----

SAMPLE_CPP = """
// struct Comment { int no; };
#include <cmath>
#define SQUARE(x) \\
  ((x) * (x))
namespace samk {

struct Nothing {
  static constexpr bool kReads = false;
  template <class V>
  SAMK_HD V weigh(V d, V /*w*/) const {
    return d;
  }
};

/* two lines
   SAMK_HD int commented(int x) { return x; } */
template <class S, class Metric>
struct TwoWords {
  S one, two;
  Metric metric;
  template <class V>
  SAMK_HD V operator()(V u, std::pair<V, V> pair) const {
    return map(u, [](S x) { return x; });
  }
  template <class V>
  SAMK_HD V step(V w, V g, V m) const { return fma(w, g, m); }
  template <class V>
  SAMK_HD V step(V w, V g) const { return w * g; }
};

SAMK_HD_CALL float power(float x, float e) { return std::pow(x, e); }
SAMK_HD_CALL double power(double x, double e) { return std::pow(x, e); }
template <class S>
SAMK_HD TwoWords<S> two(const double* row, int rule) { return {S(row[0]), S(rule)}; }
inline int of_the_host(int x) { return x; }

}  // namespace samk
"""

SAMPLE_PYTHON = """
class TwoWords(NamedTuple):
    one: tl.tensor
    two: tl.tensor
    metric: tuple

class _Private(NamedTuple):
    x: tl.tensor

class Other:
    x: int

@triton.jit
def nothing_weigh(d, w):
    return d

@triton.jit
def apply_two_words(self, u, pair, METRIC: tl.constexpr):
    return u

@triton.jit
def two_words_step(self, w, g, m=None, S: tl.constexpr = tl.float32):
    return w

@triton.jit(do_not_specialize=["x"])
def power(x, e):
    return x

@triton.jit
def two(row, rule, S: tl.constexpr):
    return row

@triton.jit
def _helper(x):
    return x

def of_the_host_of_python(x):
    return x
"""


def test_equal_texts_have_no_differences():
    assert differences(SAMPLE_CPP, SAMPLE_PYTHON) == []


# Which side is changed, what is replaced by what, and what must then be said.
CHANGES = {
    "struct in C++ only": ("cpp", "}  //", "struct New { int x; };\n}  //", r"class New: in C\+\+ only"),
    "class in Python only": (
        "python",
        "class Other:",
        "class New(typing.NamedTuple):",
        "class New: in Python only",
    ),
    "class of a struct without members": (
        "python",
        "class Other:",
        "class Nothing(NamedTuple):",
        "class Nothing: in Python only",
    ),
    "function in C++ only": (
        "cpp",
        "inline int of",
        "SAMK_HD int of",
        r"function of_the_host: in C\+\+ only",
    ),
    "function in Python only": ("python", "_helper", "helper", "function helper: in Python only"),
    "function without triton.jit": (
        "python",
        "@triton.jit\ndef nothing_weigh",
        "def nothing_weigh",
        r"function nothing_weigh: in C\+\+ only",
    ),
    "method in C++ only": ("python", "two_words_step", "_step", r"function two_words_step: in C\+\+ only"),
    "method in Python only": ("cpp", "V weigh(", "V other(", "function nothing_weigh: in Python only"),
    "operator in C++ only": (
        "python",
        "apply_two_words",
        "_apply",
        r"function apply_two_words: in C\+\+ only",
    ),
    "operator in Python only": (
        "cpp",
        "operator()(",
        "apply(",
        "function apply_two_words: in Python only",
    ),
    "field missing in Python": ("python", "    two: tl.tensor\n", "", "class TwoWords: fields"),
    "field missing in C++": ("cpp", "S one, two;", "S one;", "class TwoWords: fields"),
    "fields in another order": ("cpp", "S one, two;", "S two, one;", "class TwoWords: fields"),
    "arguments in another order in C++": (
        "cpp",
        "weigh(V d, V /*w*/)",
        "weigh(V /*w*/, V d)",
        "function nothing_weigh: arguments",
    ),
    "arguments in another order in Python": (
        "python",
        "(self, u, pair",
        "(self, pair, u",
        "function apply_two_words: arguments",
    ),
    "argument with another name": ("python", "power(x, e)", "power(x, y)", "function power: arguments"),
    "argument missing": ("python", "two(row, rule, ", "two(row, ", "function two: arguments"),
    "argument without a name": (
        "cpp",
        "V /*w*/",
        "V",
        r"function nothing_weigh: arguments \['d', '\?V'\]",
    ),
    "self missing": (
        "python",
        "apply_two_words(self, ",
        "apply_two_words(",
        "function apply_two_words: arguments",
    ),
    "self too many": (
        "python",
        "nothing_weigh(d",
        "nothing_weigh(self, d",
        "function nothing_weigh: arguments",
    ),
    "default missing": ("python", "m=None, S: tl.constexpr = tl.float32", "m", "function two_words_step: "),
    "default too many": ("python", "def power(x, e)", "def power(x, e=2)", "function power: "),
    "upper case that is no constant": (
        "python",
        "METRIC: tl.constexpr",
        "METRIC",
        "function apply_two_words: arguments",
    ),
    "constant before an argument": (
        "python",
        "(row, rule, S: tl.constexpr)",
        "(row, S: tl.constexpr, rule)",
        "function two: arguments",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_reported(change):
    side, old, new, sentence = CHANGES[change]
    texts = {"cpp": SAMPLE_CPP, "python": SAMPLE_PYTHON}
    assert texts[side].count(old) == 1
    texts[side] = texts[side].replace(old, new)
    found = differences(**texts)
    assert len(found) >= 1 and any(re.match(sentence, line) for line in found), found


def test_an_overload_that_is_no_part_of_the_longest_is_refused():
    text = SAMPLE_CPP.replace("step(V w, V g)", "step(V w, V x)")
    with pytest.raises(ValueError, match=r"two_words_step\(self, w, x\) is no part of \(self, w, g, m\)"):
        differences(text, SAMPLE_PYTHON)


def test_two_things_that_need_one_name_are_refused():
    text = SAMPLE_CPP.replace("of_the_host", "two_words_step").replace("inline int", "SAMK_HD int")
    with pytest.raises(ValueError, match="called two_words_step: of TwoWords and of the namespace"):
        differences(text, SAMPLE_PYTHON)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("const double* row", "row"),
        ("V x", "x"),
        ("const Map<K, V>& map", "map"),
        ("int rule = kDefault", "rule"),
        ("uint32_t", "?uint32_t"),
        ("const V&", "?const V&"),
        ("const V", "?const V"),
        ("unsigned int", "?unsigned int"),
    ],
)
def test_arguments_of_cpp(text, name):
    assert argument(text) == name
