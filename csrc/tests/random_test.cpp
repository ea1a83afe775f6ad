// Random words against the published vectors and, for awkward arguments, one checksum shared with
// tests/test_random.py; normal numbers against the library's functions in double.
#include "math/random.h"

#include <cmath>

#include "math/normal.h"
#include "tests/check.h"

using samk::philox;
using samk::random_word;
using samk::uniform;
using samk::Words;

namespace {

// tests/test_random.py reads this line.
constexpr uint64_t kChecksum = 0xe4d24532407cbd39;

bool equal(const Words& got, const Words& expected) {
  return got.x0 == expected.x0 && got.x1 == expected.x1 && got.x2 == expected.x2 && got.x3 == expected.x3;
}

// The known answers that come with Random123, the library of the paper's authors.
void test_vectors() {
  const uint32_t ones = 0xffffffff;
  CHECK(equal(philox(0, 0, 0, 0, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(equal(philox(ones, ones, ones, ones, ones, ones), {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // The digits of pi.
  CHECK(equal(philox(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0),
              {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Which argument goes where: the halves of element / 4, tensor, step; the halves of the seed.
void test_words() {
  const uint64_t seed = 0xa4093822299f31d0;
  for (int64_t four : {int64_t{0}, int64_t{5}, (int64_t{7} << 32) + 9}) {
    const Words words = philox(static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32), 11, 13,
                               static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const uint32_t expected[4] = {words.x0, words.x1, words.x2, words.x3};
    for (int i = 0; i < 4; ++i) CHECK(random_word(seed, 13, 11, 4 * four + i) == expected[i]);
  }
}

void test_checksum() {
  uint64_t sum = 0;
  for (uint64_t seed : {uint64_t{0}, ~uint64_t{0}, uint64_t{1} << 63, uint64_t{0x0123456789abcdef}}) {
    for (uint32_t step : {0u, 1u, 0xfffffffeu}) {
      for (uint32_t tensor : {0u, 7u, 0x80000001u}) {
        for (int64_t first :
             {int64_t{0}, (int64_t{1} << 31) - 50, (int64_t{1} << 34) - 50, int64_t{1} << 61}) {
          for (int64_t i = 0; i < 101; ++i) {
            sum = (sum ^ random_word(seed, step, tensor, first + i)) * 0x100000001b3;
          }
        }
      }
    }
  }
  if (sum != kChecksum) std::printf("checksum 0x%016llx\n", static_cast<unsigned long long>(sum));
  CHECK(sum == kChecksum);
}

void test_uniform() {
  CHECK(uniform(0) == 0 && uniform(0xff) == 0);
  CHECK(uniform(0x100) == 1.0 / 16777216 && uniform(0x80000000) == 0.5);
  CHECK(uniform(0xffffffff) == 16777215.0 / 16777216);
  for (uint32_t word = 0; word < 0xffff0000; word += 0xfff1) {
    CHECK(uniform(word) * 16777216.0 == static_cast<double>(word >> 8));
  }
}

// Whole numbers from the least to the largest, and both sides of where the mantissa and the quadrant change.
void test_logarithm_and_circle() {
  const double turn = 8 * std::atan(1.0), whole = 1 << 24;
  std::vector<uint32_t> wholes = {0, 1, 2, 3, (1u << 24) - 1};
  for (uint32_t h = 0; h < 1u << 24; h += 997) wholes.push_back(h);
  for (uint32_t edge : {1u << 21, 3u << 21, 5u << 21, 7u << 21, 11863283u, 1u << 23}) {
    for (uint32_t h = edge - 2; h < edge + 3; ++h) wholes.push_back(h);
  }
  for (uint32_t h : wholes) {
    const double logarithm = std::log((h + 1) / whole);
    CHECK(std::fabs(samk::logarithm(h + 1) - logarithm) <= 2e-7 * std::fabs(logarithm));
    const samk::Point at = samk::circle(h);
    CHECK(std::fabs(at.x - std::cos(turn * h / whole)) <= 2e-7);
    CHECK(std::fabs(at.y - std::sin(turn * h / whole)) <= 2e-7);
  }
  CHECK(samk::logarithm(1 << 24) == 0 && samk::circle(0).x == 1 && samk::circle(1 << 22).y == 1);
}

void test_normal_pair() {
  const double turn = 8 * std::atan(1.0), whole = 1 << 24;
  for (uint32_t a = 0; a < 0xfff00000; a += 0x10001) {
    const uint32_t b = a * 2654435761u;
    const samk::Point got = samk::normal_pair(a, b);
    const double radius = std::sqrt(-2 * std::log(((a >> 8) + 1) / whole)), angle = turn * (b >> 8) / whole;
    CHECK(std::fabs(got.x - radius * std::cos(angle)) <= 3e-6);
    CHECK(std::fabs(got.y - radius * std::sin(angle)) <= 3e-6);
  }
  // The largest radius, and none at all.
  CHECK(std::fabs(samk::normal_pair(0, 0).x - std::sqrt(48 * std::log(2.0))) <= 1e-6);
  CHECK(samk::normal_pair(0xffffffff, 0).x == 0);
}

}  // namespace

int main() {
  test_vectors();
  test_words();
  test_checksum();
  test_uniform();
  test_logarithm_and_circle();
  test_normal_pair();
  return finish("random_test");
}
