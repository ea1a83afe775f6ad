// The shim that runs kernels on the CPU, on kernels that are right and on kernels that are not.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "engine/cuda.cuh"
#include "tests/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

using samk::kThreads;
using samk::kWarp;

constexpr uint64_t kSeeds = 12;  // 0 is the natural order

template <class P>
cudaError_t launch(void (*kernel)(P), dim3 grid, dim3 block, P parameters) {
  void* arguments[] = {&parameters};
  return cudaLaunchKernel(kernel, grid, block, arguments, 0, nullptr);
}

bool says(const char* part) {
  const char* const sentence = cudaGetErrorString(cudaErrorLaunchFailure);
  const bool is_found = std::strstr(sentence, part) != nullptr;
  if (!is_found) std::printf("expected \"%s\" in: %s\n", part, sentence);
  return is_found;
}

// ---- indexes ---------------------------------------------------------------------------------------

struct Cover {
  int* count;
};

__global__ void __launch_bounds__(1024) cover_kernel(const __grid_constant__ Cover p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++p.count[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

bool all_are(const std::vector<int>& numbers, int expected) {
  return std::all_of(numbers.begin(), numbers.end(), [&](int x) { return x == expected; });
}

void test_indexes() {
  const dim3 grids[] = {dim3(1), dim3(5), dim3(2, 3, 4)};
  const dim3 blocks[] = {dim3(1), dim3(kThreads), dim3(7, 3, 5), dim3(1024)};
  for (uint64_t seed = 0; seed < 3; ++seed) {
    samk_shim_seed(seed);
    for (dim3 grid : grids) {
      for (dim3 block : blocks) {
        std::vector<int> count(grid.x * grid.y * grid.z * block.x * block.y * block.z);
        CHECK(launch(cover_kernel, grid, block, Cover{count.data()}) == cudaSuccess);
        CHECK(all_are(count, 1));
      }
    }
  }
}

// ---- parameters ------------------------------------------------------------------------------------

template <int kBytes>
struct Sized {
  unsigned char bytes[kBytes - 8];
  int* wrong;
};

template <int kBytes>
__global__ void sized_kernel(const __grid_constant__ Sized<kBytes> p) {
  for (int i = 0; i < kBytes - 8; ++i) {
    if (p.bytes[i] != i % 251) ++*p.wrong;
  }
}

template <int kBytes>
void test_parameters() {
  int wrong = 0;
  static Sized<kBytes> p;
  for (int i = 0; i < kBytes - 8; ++i) p.bytes[i] = static_cast<unsigned char>(i % 251);
  p.wrong = &wrong;
  void* arguments[] = {&p};
  CHECK(cudaLaunchKernel(sized_kernel<kBytes>, dim3(2), dim3(40), arguments) == cudaSuccess);
  CHECK(wrong == 0);
}

// ---- sums ------------------------------------------------------------------------------------------

struct Pass {
  const double* in;
  double* out;
  double* partials;
  unsigned* counter;
};

// Sums of whole numbers, so that any order of adding gives the same.
__global__ void sum_kernel(const __grid_constant__ Pass p) {
  __shared__ double halves[kThreads];
  const int i = threadIdx.x;
  halves[i] = p.in[blockIdx.x * kThreads + i];
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (i < n) halves[i] += halves[i + n];
  }
  if (i == 0) p.out[blockIdx.x] = halves[0];
  __syncthreads();
}

// The same through the engine: sums of blocks, and in the block that comes last the sum of all.
__global__ void last_block_kernel(const __grid_constant__ Pass p) {
  samk::BlockSum<1> join;
  double sum[1] = {p.in[blockIdx.x * kThreads + threadIdx.x]};
  join(sum, samk::Add{});
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum[0];
  if (!samk::is_last_block(p.counter)) return;
  sum[0] = threadIdx.x < gridDim.x ? __ldcg(p.partials + threadIdx.x) : 0;
  join(sum, samk::Add{});
  if (threadIdx.x == 0) *p.out += sum[0];
}

void test_sums() {
  constexpr int kBlocks = 6;
  Random random(1);
  std::vector<double> in(kBlocks * kThreads);
  std::vector<double> expected(kBlocks);
  double all = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<double>(random.bits() % 1000);
    expected[i / kThreads] += in[i];
    all += in[i];
  }
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    samk_shim_seed(seed);
    std::vector<double> sums(kBlocks), partials(kBlocks);
    CHECK(launch(sum_kernel, kBlocks, kThreads, Pass{in.data(), sums.data(), nullptr, nullptr}) ==
          cudaSuccess);
    CHECK(sums == expected);
    unsigned counter = 0;
    double sum = 0;
    // Twice, because the counter must be ready for the next launch.
    for (int k = 0; k < 2; ++k) {
      CHECK(launch(last_block_kernel, kBlocks, kThreads, Pass{in.data(), &sum, partials.data(), &counter}) ==
            cudaSuccess);
    }
    CHECK(sum == 2 * all);
    CHECK(partials == expected);
    CHECK(counter == 0);
  }
}

// ---- warps -----------------------------------------------------------------------------------------

template <class T>
struct Shuffled {
  const T* in;
  T *down, *xored, *broadcast, *part;
  unsigned* ballot;
};

template <class T>
__global__ void shuffle_kernel(const __grid_constant__ Shuffled<T> p) {
  const int i = threadIdx.x, lane = i % kWarp;
  T down = p.in[i], xored = p.in[i], part = p.in[i];
  for (int n = kWarp / 2; n > 0; n /= 2) down = down + __shfl_down_sync(0xffffffffu, down, n);
  for (int n = kWarp / 2; n > 0; n /= 2) xored = xored + __shfl_xor_sync(0xffffffffu, xored, n);
  // The two halves of a warp go separate ways, with masks of their own.
  if (lane < 16) {
    for (int n = 4; n > 0; n /= 2) part = part + __shfl_xor_sync(0xffffu, part, n, 8);
  } else {
    part = __shfl_down_sync(0xffff0000u, part, 3, 8);
  }
  __syncwarp();
  p.down[i] = down;
  p.xored[i] = xored;
  p.part[i] = part;
  p.broadcast[i] = __shfl_sync(0xffffffffu, p.in[i], 5);
  p.ballot[i] = __ballot_sync(0xffffffffu, p.in[i] > T(20));
}

template <class T>
void test_shuffles() {
  constexpr int kCount = 3 * kWarp;
  Random random(2);
  std::vector<T> in(kCount);
  for (T& x : in) x = static_cast<T>(random.bits() % 40);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    samk_shim_seed(seed);
    std::vector<T> down(kCount), xored(kCount), broadcast(kCount), part(kCount);
    std::vector<unsigned> ballot(kCount);
    CHECK(launch(shuffle_kernel<T>, 1, kCount,
                 Shuffled<T>{in.data(), down.data(), xored.data(), broadcast.data(), part.data(),
                             ballot.data()}) == cudaSuccess);
    for (int i = 0; i < kCount; ++i) {
      const T* const warp = &in[i / kWarp * kWarp];
      const int lane = i % kWarp;
      T sum{}, eight{};
      unsigned bits = 0;
      for (int k = 0; k < kWarp; ++k) {
        sum += warp[k];
        if (k / 8 == lane / 8) eight += warp[k];
        bits |= unsigned{warp[k] > T(20)} << k;
      }
      if (lane == 0) CHECK(down[i] == sum);
      CHECK(xored[i] == sum);
      CHECK(broadcast[i] == warp[5]);
      CHECK(ballot[i] == bits);
      CHECK(part[i] == (lane < 16 ? eight : warp[lane % 8 < 5 ? lane + 3 : lane]));
    }
  }
}

// ---- atomics ---------------------------------------------------------------------------------------

struct Atomics {
  int* i;
  unsigned *u, *most, *bits, *last;
  unsigned long long* l;
  float* f;
  double* d;
  int* seen;
};

__global__ void atomics_kernel(const __grid_constant__ Atomics p) {
  const unsigned n = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(p.i, -1);
  ++p.seen[atomicAdd(p.u, 1u)];
  atomicAdd(p.l, 1ull << 32);
  atomicAdd(p.f, 0.5f);
  atomicAdd(p.d, 0.25);
  atomicMax(p.most, n);
  atomicOr(p.bits, 1u << (n % 32));
  ++p.seen[atomicExch(p.last, n)];
}

void test_atomics() {
  constexpr unsigned kCount = 4 * kThreads;
  samk_shim_seed(3);
  int i = 0;
  unsigned u = 0, most = 0, bits = 0, last = kCount;
  unsigned long long l = 0;
  float f = 0;
  double d = 0;
  std::vector<int> seen(kCount + 1);
  CHECK(launch(atomics_kernel, 4, kThreads, Atomics{&i, &u, &most, &bits, &last, &l, &f, &d, seen.data()}) ==
        cudaSuccess);
  CHECK(i == -static_cast<int>(kCount) && u == kCount && most == kCount - 1 && bits == 0xffffffffu);
  CHECK(l == static_cast<unsigned long long>(kCount) << 32 && f == kCount * 0.5f && d == kCount * 0.25);
  // Every number came out of the sum once, and of the exchange once, but for the one that is still there.
  ++seen[last];
  --seen[kCount];
  for (unsigned k = 0; k < kCount; ++k) CHECK(seen[k] == 2);
  CHECK(seen[kCount] == 0);
  CHECK(__popc(0xf0f00001u) == 9);
  CHECK(__longlong_as_double(__double_as_longlong(-1.5)) == -1.5);
}

// ---- mistakes that the order brings to light -------------------------------------------------------

struct Wrong {
  int* wrong;
};

// Reads what its neighbour writes without waiting for it. In natural order the neighbour was there before.
__global__ void no_barrier_kernel(const __grid_constant__ Wrong p) {
  __shared__ int numbers[kThreads];
  const int i = threadIdx.x;
  numbers[i] = -1;
  __syncthreads();
  numbers[i] = i;
  if (i > 0 && numbers[i - 1] != i - 1) ++*p.wrong;
}

// Adds over the block again and again through the same memory: a warp may write the next sums while the first
// thread still reads these.
__global__ void one_buffer_kernel(const __grid_constant__ Wrong p) {
  __shared__ int parts[kThreads / kWarp];
  for (int round = 0; round < 4; ++round) {
    int x = round;
    for (int n = kWarp / 2; n > 0; n /= 2) x += __shfl_down_sync(0xffffffffu, x, n);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int part : parts) {
      if (part != round * kWarp) ++*p.wrong;
    }
  }
}

// Leans on the blocks' order.
__global__ void block_order_kernel(const __grid_constant__ Wrong p) {
  __shared__ unsigned next;
  if (blockIdx.x == 0) next = 0;
  if (next != blockIdx.x) ++*p.wrong;
  next = blockIdx.x + 1;
}

void test_mistakes() {
  const struct {
    void (*kernel)(Wrong);
    int blocks, threads;
  } cases[] = {
      {no_barrier_kernel, 1, kThreads}, {one_buffer_kernel, 1, kThreads}, {block_order_kernel, 8, 1}};
  for (const auto& [kernel, blocks, threads] : cases) {
    int found = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      samk_shim_seed(seed);
      int wrong = 0;
      CHECK(launch(kernel, blocks, threads, Wrong{&wrong}) == cudaSuccess);
      if (seed == 0) {
        CHECK(wrong == 0);
      } else {
        found += wrong != 0;
      }
    }
    CHECK(found > 0);
  }
}

// A seed stands for one order.
void test_seed() {
  int first = 0, second = 0;
  samk_shim_seed(5);
  CHECK(launch(no_barrier_kernel, 3, kThreads, Wrong{&first}) == cudaSuccess);
  samk_shim_seed(5);
  CHECK(launch(no_barrier_kernel, 3, kThreads, Wrong{&second}) == cudaSuccess);
  CHECK(first == second);
}

// ---- launches that get stuck -----------------------------------------------------------------------

__global__ void returns_early_kernel(const __grid_constant__ Wrong) {
  if (blockIdx.x == 1 && threadIdx.x == 77) return;
  __syncthreads();
}

__global__ void lane_missing_kernel(const __grid_constant__ Wrong p) {
  if (threadIdx.x == 40) __syncthreads();
  *p.wrong += __shfl_xor_sync(0xffffffffu, 0, 1);
  if (threadIdx.x != 40) __syncthreads();
}

__global__ void masks_differ_kernel(const __grid_constant__ Wrong) {
  __syncwarp(threadIdx.x == 3 ? 0xffu : 0xffffffffu);
}

__global__ void outside_mask_kernel(const __grid_constant__ Wrong p) {
  if (threadIdx.x == 9) *p.wrong += static_cast<int>(__ballot_sync(0xffu, 1));
}

void test_stuck() {
  const struct {
    void (*kernel)(Wrong);
    const char *where, *waits, *other;
  } cases[] = {
      {returns_early_kernel, "block (1, 0, 0): ", "thread (0, 0, 0) waits at __syncthreads",
       "thread (77, 0, 0) has returned"},
      {lane_missing_kernel, "block (0, 0, 0): ", "thread (32, 0, 0) waits in __shfl_xor_sync",
       "thread (40, 0, 0) waits at __syncthreads"},
      {masks_differ_kernel, "block (0, 0, 0): ", "waits in __syncwarp with mask 0xffffffff",
       "thread (3, 0, 0) waits in __syncwarp with mask 0x000000ff"},
      {outside_mask_kernel, "block (0, 0, 0): ",
       "thread (9, 0, 0) waits in __ballot_sync with mask 0x000000ff", "does not name it"},
  };
  // Once more in natural order, and several rounds, so that fibers that were left are used again.
  for (int round = 0; round < 3; ++round) {
    samk_shim_seed(0);
    for (const auto& [kernel, where, waits, other] : cases) {
      int wrong = 0;
      CHECK(launch(kernel, 2, kThreads, Wrong{&wrong}) == cudaErrorLaunchFailure);
      CHECK(says(where) && says(waits) && says(other));
      CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
      CHECK(cudaGetLastError() == cudaSuccess);
    }
    test_sums();
    samk_shim_seed(round + 1);
    for (const auto& [kernel, where, waits, other] : cases) {
      int wrong = 0;
      CHECK(launch(kernel, 2, kThreads, Wrong{&wrong}) == cudaErrorLaunchFailure);
    }
  }
  cudaGetLastError();
}

// ---- host ------------------------------------------------------------------------------------------

void test_host() {
  int x = 0;
  const Cover cover{&x};
  CHECK(launch(cover_kernel, 0, 1, cover) == cudaErrorInvalidConfiguration);
  CHECK(launch(cover_kernel, 1, 0, cover) == cudaErrorInvalidConfiguration);
  CHECK(launch(cover_kernel, dim3(1, 65536), 1, cover) == cudaErrorInvalidConfiguration);
  CHECK(launch(cover_kernel, 1, 1025, cover) == cudaErrorInvalidConfiguration);
  CHECK(launch(cover_kernel, 1, dim3(32, 33), cover) == cudaErrorInvalidConfiguration);
  CHECK(launch(cover_kernel, 1, dim3(1, 1, 65), cover) == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  static Sized<32768> large;
  void* arguments[] = {&large};
  CHECK(cudaLaunchKernel(sized_kernel<32768>, 1, 1, arguments) == cudaErrorInvalidValue);
  void* small[] = {&x};
  CHECK(cudaLaunchKernel(cover_kernel, 1, 1, small, 1024) == cudaErrorInvalidValue);
  CHECK(x == 0);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaSuccess);
  int value = -1;
  CHECK(cudaGetDeviceCount(&value) == cudaSuccess && value == 1);
  CHECK(cudaGetDevice(&value) == cudaSuccess && value == 0);
  CHECK(cudaSetDevice(0) == cudaSuccess && cudaSetDevice(1) == cudaErrorInvalidDevice);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && value == 9);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value > 0);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1) == cudaErrorInvalidDevice);
  CHECK(std::string(cudaGetErrorString(cudaErrorInvalidDevice)) == "invalid device ordinal");
  cudaGetLastError();
}

// Launches from several threads take turns.
void test_threads() {
  samk_shim_seed(7);
  std::vector<std::vector<int>> counts(3, std::vector<int>(4 * kThreads));
  std::vector<std::thread> threads;
  for (auto& count : counts) {
    threads.emplace_back([&count] {
      for (int k = 0; k < 10; ++k) launch(cover_kernel, 4, kThreads, Cover{count.data()});
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& count : counts) CHECK(all_are(count, 10));
}

// ---- AddressSanitizer ------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
struct Heap {
  int* numbers;
  int n;
};

__global__ void one_past_kernel(const __grid_constant__ Heap p) {
  __syncthreads();
  const int i = threadIdx.x;
  if (i <= p.n) p.numbers[i] = i;
}

__global__ void local_kernel(const __grid_constant__ Heap p) {
  int local[4] = {};
  int* volatile hidden = local;  // from the compiler
  __syncthreads();
  hidden[p.n] = 1;
  p.numbers[0] += local[0];
}

// Whether a child that runs the kernel dies of what AddressSanitizer finds, which it names.
bool dies(void (*kernel)(Heap), int n, const char* finding) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    std::vector<int> numbers(100);
    launch(kernel, 1, 128, Heap{numbers.data(), n});
    _exit(0);
  }
  close(ends[1]);
  std::string report;
  char buffer[4096];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) report.append(buffer, got);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool is_found = report.find(finding) != std::string::npos;
  if (!is_found && !report.empty()) std::printf("%s\n", report.c_str());
  return status != 0 && is_found;
}

void test_sanitizer() {
  samk_shim_seed(0);
  CHECK(!dies(one_past_kernel, 99, "heap-buffer-overflow"));
  CHECK(dies(one_past_kernel, 100, "heap-buffer-overflow"));
  CHECK(!dies(local_kernel, 3, "stack-buffer-overflow"));
#if defined(__x86_64__) && !defined(SAMK_SHIM_UCONTEXT)
  // Elsewhere swapcontext() switches, and AddressSanitizer then forgets what is on the stack.
  CHECK(dies(local_kernel, 4, "stack-buffer-overflow"));
#endif
}
#else
void test_sanitizer() {}
#endif

}  // namespace

int main() {
  test_indexes();
  test_parameters<16>();
  test_parameters<64>();
  test_parameters<72>();
  test_parameters<4096>();
  test_parameters<32760>();
  test_sums();
  test_shuffles<int>();
  test_shuffles<unsigned>();
  test_shuffles<int64_t>();
  test_shuffles<uint64_t>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_atomics();
  test_mistakes();
  test_seed();
  test_stuck();
  test_host();
  test_threads();
  test_sanitizer();
  return finish("shim_test");
}
