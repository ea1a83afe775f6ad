// Threads of execution that switch by themselves, each on a stack of its own. Knows no CUDA.
#ifndef SAM_KERNELS_TESTS_SHIM_FIBER_H_
#define SAM_KERNELS_TESTS_SHIM_FIBER_H_

#include <cstddef>

// Defining SAMK_SHIM_UCONTEXT chooses on x86-64, too, what other machines use.
#if !defined(SAMK_SHIM_UCONTEXT) && !(defined(__x86_64__) && defined(__linux__))
#define SAMK_SHIM_UCONTEXT
#endif

namespace samk::shim {

struct Fiber {
  void* context = nullptr;
  char* stack = nullptr;       // null: that of the thread which launches
  void* fake_stack = nullptr;  // this and the next two are AddressSanitizer's
  const void* bottom = nullptr;
  size_t bytes = 0;
};

// What every fiber does, over and over.
struct Work {
  void (*body)();
  void (*returned)();  // comes back when body is to run again
};
extern Work work;

// note: [parameters in place]
// A kernel takes up to 32 KB by value, which on x86-64 lie right above its return address. To copy that for
// each of 256 threads would cost a millisecond a block. So the pages above all stacks are the same memory,
// written once for each launch, and a fiber calls the body with its stack pointer exactly there.
#if defined(SAMK_SHIM_UCONTEXT)
constexpr bool kInPlace = false;
#else
constexpr bool kInPlace = true;
#endif
constexpr size_t kParameterPages = 32768;

// Where to write them; null when the system has no memory.
void* parameters_in_place();
// After fork(), when the memory is still the parent's; fibers from before may not be used any more.
void forget_parameters();

// The next switch to the fiber begins the work anew, whatever it did before; gives it a stack where it has
// none. False when the system has no memory.
bool start(Fiber& fiber);

// Returns when something switches back to self; never where is_last is set.
void switch_fiber(Fiber& self, Fiber& next, bool is_last = false);

}  // namespace samk::shim

#endif  // SAM_KERNELS_TESTS_SHIM_FIBER_H_
