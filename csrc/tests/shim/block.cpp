#include "block.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace samk::shim {

Shuffle shuffled(std::getenv("SAM_KERNELS_SHIM_SEED"));

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtBarrier, kInWarp, kReturned, kAbandoned };

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number;
  State state;
  // While it waits for lanes of its warp:
  Operation operation;
  unsigned mask;
  unsigned source;  // a lane
  uint64_t value;   // in, then out
};

// Every thread is in it at most once.
class Queue {
 public:
  bool is_empty() const { return size_ == 0; }
  void push_back(Thread* thread) { slots_[(first_ + size_++) % kMaxThreads] = thread; }
  void push_front(Thread* thread) {
    first_ = (first_ + kMaxThreads - 1) % kMaxThreads;
    ++size_;
    slots_[first_] = thread;
  }
  Thread* pop() {
    Thread* const thread = slots_[first_];
    first_ = (first_ + 1) % kMaxThreads;
    --size_;
    return thread;
  }

 private:
  Thread* slots_[kMaxThreads];
  unsigned first_ = 0, size_ = 0;
};

Thread threads[kMaxThreads];  // they never move: suspended fibers refer to them
unsigned started;             // those that have a stack
unsigned count;               // of the current block
Queue ready;
Fiber launcher;
Thread* running;
unsigned at_barrier, returned;

// note: [order]
// Between two barriers the ready threads run in one of two ways. By warps: a warp runs as far as it can
// before the next begins, so that it may be many warp functions ahead. Mixed: every thread runs up to where
// it waits, and then every other. Each finds races that the other hides; a seed draws one of them, and the
// order of warps and lanes, afresh at every barrier.
bool by_warps = true;

// Leaves self for the next thread that can run; for the launcher where there is none.
void go_on(Fiber& self, bool is_last = false) {
  Fiber* next = &launcher;
  if (!ready.is_empty()) {
    running = ready.pop();
    threadIdx = running->index;
    next = &running->fiber;
    if (next == &self) return;
  }
  switch_fiber(self, *next, is_last);
}

// Returns when the thread has been made ready again.
void wait(Thread& self) {
  go_on(self.fiber);
  if (self.state == State::kAbandoned) go_on(self.fiber, true);
}

void thread_returned() {
  Thread& self = *running;
  ++returned;
  self.state = State::kReturned;
  wait(self);
}

void make_all_ready() {
  Thread* order[kMaxThreads];
  for (unsigned i = 0; i < count; ++i) {
    order[i] = &threads[i];
    threads[i].state = State::kReady;
  }
  at_barrier = 0;
  by_warps = !shuffled.is_on() || shuffled.bits() % 2 == 0;
  if (!by_warps) {
    shuffled(order, count);
    for (unsigned i = 0; i < count; ++i) ready.push_back(order[i]);
    return;
  }
  unsigned first[kMaxThreads / kWarp];
  const unsigned warps = (count + kWarp - 1) / kWarp;
  for (unsigned w = 0; w < warps; ++w) first[w] = w * kWarp;
  shuffled(first, warps);
  for (unsigned w = 0; w < warps; ++w) {
    const unsigned lanes = std::min(kWarp, count - first[w]);
    shuffled(order + first[w], lanes);
    for (unsigned i = 0; i < lanes; ++i) ready.push_back(order[first[w] + i]);
  }
}

// ---- warps -----------------------------------------------------------------------------------------

// The lane that a lane reads, as CUDA defines it; its own where that would be outside its part of the warp.
unsigned source_lane(Operation operation, unsigned lane, int operand, int width) {
  const unsigned part = static_cast<unsigned>(width) - 1;
  const unsigned end = lane | part;
  unsigned source = lane;
  if (operation == Operation::kShuffle) source = (lane & ~part) | (static_cast<unsigned>(operand) & part);
  if (operation == Operation::kShuffleDown) source = lane + static_cast<unsigned>(operand);
  if (operation == Operation::kShuffleXor) source = lane ^ static_cast<unsigned>(operand);
  return source <= end ? source : lane;
}

bool is_in(unsigned mask, unsigned lane) { return (mask >> lane & 1) != 0; }

bool joins(const Thread& thread, const Thread& other) {
  return other.state == State::kInWarp && other.operation == thread.operation && other.mask == thread.mask;
}

Thread* warp_of(const Thread& thread) { return &threads[thread.number / kWarp * kWarp]; }

unsigned lanes_of(const Thread& thread) { return std::min(kWarp, count - thread.number / kWarp * kWarp); }

// The lane that the thread still waits for, or none.
const Thread* find_missing(const Thread& thread) {
  const Thread* const warp = warp_of(thread);
  // From the last lane on: in natural order it is the last to come.
  for (unsigned lane = lanes_of(thread); lane-- > 0;) {
    if (is_in(thread.mask, lane) && !joins(thread, warp[lane])) return &warp[lane];
  }
  return nullptr;
}

void release_lanes(const Thread& last) {
  Thread* const warp = warp_of(last);
  const Operation operation = last.operation;
  uint64_t values[kWarp];
  uint64_t ballot = 0;
  Thread* order[kWarp];
  unsigned lanes = 0, present = 0;
  for (unsigned lane = 0; lane < lanes_of(last); ++lane) {
    if (!is_in(last.mask, lane)) continue;
    values[lane] = warp[lane].value;
    ballot |= (values[lane] & 1) << lane;
    present |= 1u << lane;
    order[lanes++] = &warp[lane];
  }
  for (unsigned i = 0; i < lanes; ++i) {
    Thread& thread = *order[i];
    thread.state = State::kReady;
    thread.value = operation == Operation::kBallot ? ballot
                   : is_in(present, thread.source) ? values[thread.source]
                                                   : ~uint64_t{0};
  }
  shuffled(order, lanes);
  if (by_warps) {
    while (lanes > 0) ready.push_front(order[--lanes]);
  } else {
    for (unsigned i = 0; i < lanes; ++i) ready.push_back(order[i]);
  }
}

// ---- what went wrong -------------------------------------------------------------------------------

std::string in_words(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

std::string in_words(const Thread& thread) {
  static const char* const names[] = {"__syncwarp", "__ballot_sync", "__shfl_sync", "__shfl_down_sync",
                                      "__shfl_xor_sync"};
  const std::string who = "thread " + in_words(thread.index);
  if (thread.state == State::kReturned) return who + " has returned";
  if (thread.state == State::kAtBarrier) return who + " waits at __syncthreads";
  char mask[16];
  std::snprintf(mask, sizeof mask, "0x%08x", thread.mask);
  return who + " waits in " + names[static_cast<int>(thread.operation)] + " with mask " + mask;
}

// Why no thread can go on, though not all have returned.
std::string describe() {
  const std::string block = "block " + in_words(blockIdx) + ": ";
  const Thread *barrier = nullptr, *end = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == State::kInWarp) {
      if (!is_in(thread.mask, i % kWarp)) return block + in_words(thread) + ", which does not name it";
      return block + in_words(thread) + " for a lane that never comes: " + in_words(*find_missing(thread));
    }
    const Thread*& first = thread.state == State::kAtBarrier ? barrier : end;
    if (first == nullptr) first = &thread;
  }
  return block + in_words(*barrier) + ", but " + in_words(*end);
}

// Lets every thread that waits leave its stack for good.
void abandon() {
  for (unsigned i = 0; i < count; ++i) {
    threads[i].state = State::kAbandoned;
    ready.push_back(&threads[i]);
  }
  go_on(launcher);
  for (unsigned i = 0; i < count; ++i) start(threads[i].fiber);
}

}  // namespace

uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int operand, int width) {
  Thread& self = *running;
  const unsigned lane = self.number % kWarp;
  self.operation = operation;
  self.mask = mask;
  self.source = source_lane(operation, lane, operand, width);
  self.value = value;
  self.state = State::kInWarp;
  if (is_in(mask, lane) && find_missing(self) == nullptr) release_lanes(self);
  wait(self);
  return self.value;
}

bool prepare_threads(dim3 block) {
  static pid_t owner = getpid();
  if (owner != getpid()) {
    // A child must not share the parameters with its parent; the stacks are copies, and are left alone.
    std::fill(threads, threads + started, Thread{});
    started = 0;
    forget_parameters();
    owner = getpid();
  }
  work.returned = thread_returned;
  count = block.x * block.y * block.z;
  for (; started < count; ++started) {
    threads[started].number = started;
    if (!start(threads[started].fiber)) return false;
  }
  for (unsigned i = 0; i < count; ++i) {
    threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  return true;
}

std::string run_block() {
  returned = 0;
  do {
    make_all_ready();
    go_on(launcher);
  } while (at_barrier == count);
  if (returned == count) return "";
  const std::string problem = describe();
  abandon();
  return problem;
}

}  // namespace samk::shim

void __syncthreads() {
  using namespace samk::shim;
  Thread& self = *running;
  ++at_barrier;
  self.state = State::kAtBarrier;
  wait(self);
}
