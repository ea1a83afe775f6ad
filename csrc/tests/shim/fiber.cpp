#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(SAMK_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SAMK_SHIM_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SAMK_SHIM_ASAN
#endif
#if defined(SAMK_SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace samk::shim {

Work work;

namespace {

#if defined(SAMK_SHIM_ASAN)
constexpr size_t kFrames = 128 << 10;
#else
constexpr size_t kFrames = 64 << 10;
#endif
// Where parameters are not in place, they are copied to the stack.
constexpr size_t kStack = kInPlace ? kFrames : kFrames + kParameterPages;

#if defined(SAMK_SHIM_ASAN)
Fiber* left;
Fiber* entered;

void before_switch(Fiber& self, Fiber& next, bool is_last) {
  left = &self;
  entered = &next;
  // Without a place to keep it, the fake stack is destroyed.
  __sanitizer_start_switch_fiber(is_last ? nullptr : &self.fake_stack, next.bottom, next.bytes);
}
void after_switch() {
  // Fills in where the stack of the launching thread lies.
  __sanitizer_finish_switch_fiber(entered->fake_stack, &left->bottom, &left->bytes);
}
void forget_frames(Fiber& fiber) {
  __asan_unpoison_memory_region(fiber.stack, kStack);
  fiber.fake_stack = nullptr;
  fiber.bottom = fiber.stack;
  fiber.bytes = kStack;
}
#else
void before_switch(Fiber&, Fiber&, bool) {}
void after_switch() {}
void forget_frames(Fiber&) {}
#endif

size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Address space that faults, after a page that stays so: a stack that overflows must not go unnoticed.
char* reserve(size_t bytes) {
  void* const p =
      mmap(nullptr, page() + bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<char*>(p) + page();
}

}  // namespace

#if !defined(SAMK_SHIM_UCONTEXT)

namespace {
int memory = -1;
void* parameters = nullptr;
}  // namespace

extern "C" {
__attribute__((visibility("hidden"))) void samk_shim_swap(void** from, void* to);
__attribute__((visibility("hidden"))) void samk_shim_begin();
// Called by the assembly.
__attribute__((visibility("hidden"), used)) void (*samk_shim_first())() {
  after_switch();
  return work.body;
}
__attribute__((visibility("hidden"), used)) void (*samk_shim_again())() {
  work.returned();
  return work.body;
}
}

// The control words of the floating point unit are not switched: kernels leave them alone, and so they are
// those of the thread that launches. Where a fiber begins its stack pointer is at the parameters, and a call
// puts the return address below them, as the ABI has it.
asm(R"(
.pushsection .text
.hidden samk_shim_swap
.globl samk_shim_swap
.type samk_shim_swap, @function
samk_shim_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size samk_shim_swap, . - samk_shim_swap

.hidden samk_shim_begin
.globl samk_shim_begin
.type samk_shim_begin, @function
samk_shim_begin:
  .cfi_startproc
  .cfi_undefined rip
  call samk_shim_first
1:
  call *%rax
  call samk_shim_again
  jmp 1b
  .cfi_endproc
.size samk_shim_begin, . - samk_shim_begin
.popsection
)");

void* parameters_in_place() {
  if (parameters != nullptr) return parameters;
  memory = memfd_create("samk_shim", MFD_CLOEXEC);
  if (memory < 0 || ftruncate(memory, kParameterPages) != 0) return nullptr;
  void* const p = mmap(nullptr, kParameterPages, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (p != MAP_FAILED) parameters = p;
  return parameters;
}

void forget_parameters() {
  if (parameters == nullptr) return;
  munmap(parameters, kParameterPages);
  close(memory);
  parameters = nullptr;
}

bool start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    char* const stack = reserve(kStack + kParameterPages);
    if (stack == nullptr || parameters_in_place() == nullptr ||
        mprotect(stack, kStack, PROT_READ | PROT_WRITE) != 0 ||
        mmap(stack + kStack, kParameterPages, PROT_READ, MAP_SHARED | MAP_FIXED, memory, 0) == MAP_FAILED) {
      return false;
    }
    fiber.stack = stack;
  }
  forget_frames(fiber);
  // What swap finds: six registers, all zero so that a backtrace ends here, and where to return to.
  const auto begin = reinterpret_cast<uintptr_t>(&samk_shim_begin);
  const uintptr_t saved[7] = {0, 0, 0, 0, 0, 0, begin};
  fiber.context = fiber.stack + kStack - sizeof saved;
  std::memcpy(fiber.context, saved, sizeof saved);
  return true;
}

void switch_fiber(Fiber& self, Fiber& next, bool is_last) {
  before_switch(self, next, is_last);
  samk_shim_swap(&self.context, next.context);
  after_switch();
}

#else

namespace {

ucontext_t* context_of(Fiber& fiber) {
  if (fiber.context == nullptr) fiber.context = new ucontext_t();
  return static_cast<ucontext_t*>(fiber.context);
}

void begin() {
  after_switch();
  for (;;) {
    work.body();
    work.returned();
  }
}

}  // namespace

void* parameters_in_place() { return nullptr; }
void forget_parameters() {}

bool start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    char* const stack = reserve(kStack);
    if (stack == nullptr || mprotect(stack, kStack, PROT_READ | PROT_WRITE) != 0) return false;
    fiber.stack = stack;
  }
  forget_frames(fiber);
  ucontext_t* const context = context_of(fiber);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = kStack;
  makecontext(context, begin, 0);
  return true;
}

void switch_fiber(Fiber& self, Fiber& next, bool is_last) {
  before_switch(self, next, is_last);
  swapcontext(context_of(self), context_of(next));
  after_switch();
}

#endif

}  // namespace samk::shim
