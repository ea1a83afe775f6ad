// The C ABI of the passes. One function per pass; the CPU library, the CUDA library and the
// CUDA sources emulated on the CPU all export it, so that whatever drives one drives all.
//
// Plain C types only: pointers, sizes, dtype codes, a stream handle. No torch, no Python.
// Every function returns 0, or non-zero with a sentence in samk_last_error().
#ifndef SAM_KERNELS_H_
#define SAM_KERNELS_H_

#include <stdint.h>

#if defined(_WIN32)
#define SAMK_API __declspec(dllexport)
#else
#define SAMK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SAMK_ABI_VERSION 7

enum samk_dtype { SAMK_F32 = 0, SAMK_F64 = 1, SAMK_BF16 = 2, SAMK_F16 = 3 };

// Parallel lists: element t of every list belongs to parameter t and has numel[t] elements, dense
// and in the same memory order as the parameter. data[t] == NULL means "tensor t takes no part".
// data == NULL means "there is no such list".
typedef struct samk_list {
  void* const* data;
  int32_t dtype;
} samk_list;

// note: [masks]
// A mask has one bit for each element of its tensor, in memory order: element i is bit i % 64 of word i / 64,
// uint64_t, and the bits beyond the last element are 0. Words begin at multiples of 8 bytes. data[t] == NULL
// means that tensor t is dense: all its elements are perturbed. The dtype of such a list is not looked at.
//
// Where a word is 0, perturb may pass its 64 elements over, without a snapshot; in other words all 64 have
// one. Restore and descend of the same library, given the same masks, know which have one and read the weight
// where there is none.
//
// Where a tensor has `offsets`, int64_t by word, its snapshot is compact: it holds the elements whose bit is
// set and no others, those of word k from offsets[k] on.

// note: [table of scalars]
// Hyperparameters live in rows of doubles on the device of the tensors; row[t] names the row of
// tensor t. A row is one param group under one metric, so one launch serves every param group.
enum samk_column {
  SAMK_METRIC = 0,  // enum samk_metric: how weights are measured, or that they take no part
  SAMK_ETA,         // floor added to |w| by SAMK_ADAPTIVE, factor of d^2 in SAMK_FISHER
  SAMK_RHO,         // radius; negative where the base optimizer maximizes
  SAMK_EPS,         // added to the norm
  SAMK_LR,
  SAMK_WEIGHT_DECAY,
  SAMK_MAXIMIZE,   // 0 or 1
  SAMK_MOMENTUM,   // SGD
  SAMK_DAMPENING,  // SGD
  SAMK_NESTEROV,   // SGD, 0 or 1
  SAMK_BETA1,      // Adam
  SAMK_BETA2,      // Adam
  SAMK_ADAM_EPS,   // Adam
  SAMK_DECOUPLED,  // Adam, 1 = AdamW
  SAMK_COLUMNS = 16
};

enum samk_metric {
  SAMK_FIXED = 0,      // not perturbed and not counted in the norm (masked out as a whole)
  SAMK_EUCLIDEAN = 1,  // T = 1
  SAMK_ADAPTIVE = 2,   // T = |w| + eta
  SAMK_FISHER = 3      // T = (1 + eta g^2)^(-1/2); with SAMK_SQUARE and SAMK_LINEAR alone
};

// What one element u = T * g contributes to sq_norm, and the shape h(u) of the perturbation. q may be
// infinite, for p = 1: the power is then 1 where |u| is the peak and 0 below.
enum samk_moment {
  SAMK_SQUARE = 0 /* u^2 */,
  SAMK_PEAK = 1 /* max |u| */,
  SAMK_POWER = 2 /* (|u|/peak)^q */
};
enum samk_shape {
  SAMK_LINEAR = 0 /* u */,
  SAMK_SIGN = 1 /* sign(u) */,
  SAMK_POWERED = 2 /* sign(u)(|u|/peak)^(q-1) */
};

enum samk_rule { SAMK_SGD = 0, SAMK_ADAM = 1 };

// Where a pass runs. The CPU library ignores both.
typedef struct samk_queue {
  void* stream;    // cudaStream_t
  int32_t device;  // ordinal of the tensors' device
} samk_queue;

// The chunk plan of one layout (numel of every tensor), made once. note: [chunk order]
// Chunks are fixed by the sizes alone, never by the number of threads, so every sum has one order.
typedef struct samk_plan samk_plan;
SAMK_API samk_plan* samk_plan_create(const int64_t* numel, int64_t count);
SAMK_API void samk_plan_destroy(samk_plan* plan);

// Bytes of device memory that passes with a `workspace` need; 0 for the CPU library. The caller clears it
// once and hands in the same memory for as long as it uses the plan; one pass at a time may use it.
SAMK_API int64_t samk_plan_workspace_bytes(const samk_plan* plan);

// out[0] = sum (or max) over tensors with data and a row that is not SAMK_FIXED of moment(T * g).
// params may be absent unless a row is SAMK_ADAPTIVE, and may be fp32, as masters are, beside half gradients.
// A NaN or infinity in any gradient that counts makes out[0] non-finite, whatever the moment. out[0] is then
// taken to the power 1/root. A row that is SAMK_FISHER is measured in squares: with another moment the sum of
// its tensors is NaN.
typedef struct samk_sq_norm_args {
  samk_list grads, params;
  samk_list masks;  // note: [masks]; where there are some, only elements whose bit is set count
  const int32_t* row;
  const double* table;
  int32_t moment;      // enum samk_moment
  double q;            // SAMK_POWER
  const double* peak;  // SAMK_POWER: device scalar
  double root;         // 0 and 1 leave the sum as it is, 2 gives the Euclidean norm
  double* out;         // [1]
  double* per_tensor;  // NULL, or [count]: the sum per tensor, without the root (0 for those without a part)
  void* workspace;
  samk_queue queue;
} samk_sq_norm_args;
SAMK_API int samk_sq_norm(const samk_plan*, const samk_sq_norm_args*);

// snapshot = w;  w += scale * T * h(T * g),  scale = rho / (norm + eps) * tensor_scale[t].
// SAMK_SIGN uses scale = rho * tensor_scale[t]. A scale that is not finite in the calculating type is
// taken as 0. A tensor without a snapshot is not perturbed. If *norm is not finite the weights keep their
// bits (a branch, never a multiplication by zero) and the snapshot is still written; so it is where a row is
// SAMK_FISHER and the shape is not SAMK_LINEAR. Tensors without gradient data, or with a SAMK_FIXED row, are
// left alone altogether.
//
// A tensor's gradient may be the same memory as its own snapshot, if that is whole: every element is read
// before it is written, and the gradient is gone afterwards. Lists do not overlap otherwise.
//
// Where a tensor has a master, that fp32 weight is the truth and w its rounded copy: w = round(master + ...),
// and no snapshot is written or needed. In a list of masters a tensor without one is not perturbed.
//
// note: [stochastic rounding]
// With `number`, bf16 weights without masters are rounded up or down at random, up with the probability that
// makes the mean of the result what was rounded: 16 random bits are added below those that stay. The bits are
// a function of seed, step, number[t] and the element's place in memory; see sixteen_of in math/random.h.
typedef struct samk_perturb_args {
  samk_list params, grads, snapshots, masters;
  samk_list masks;    // note: [masks]; elements whose bit is clear keep their bits
  samk_list offsets;  // absent, or those of compact snapshots
  const int32_t* row;
  const double* table;
  int32_t shape;  // enum samk_shape
  double q;
  const double* peak;
  const double* norm;          // device scalar
  const double* tensor_scale;  // NULL, or [count]
  const uint32_t* number;      // NULL for rounding to nearest, or by tensor; note: [stochastic rounding]
  uint64_t seed;               // these two with `number`
  uint32_t step;
  samk_queue queue;
} samk_perturb_args;
SAMK_API int samk_perturb(const samk_plan*, const samk_perturb_args*);

// w = snapshot, where there is one. With masters instead: w = round(master), where there is one.
typedef struct samk_restore_args {
  samk_list params, snapshots, masters;
  samk_list masks, offsets;  // those of the perturbation
  samk_queue queue;
} samk_restore_args;
SAMK_API int samk_restore(const samk_plan*, const samk_restore_args*);

// All dots of `lists` gradient lists (at most 3) in one read: out = upper triangle, row by row
// (00 01 02 11 12 22). A tensor missing from either list adds nothing to that dot.
typedef struct samk_grad_stats_args {
  samk_list list[3];
  int32_t lists;
  double* out;         // [lists * (lists + 1) / 2]
  double* per_tensor;  // NULL, or [count, lists * (lists + 1) / 2]: the dots by tensor, in the same order
  void* workspace;
  samk_queue queue;
} samk_grad_stats_args;
SAMK_API int samk_grad_stats(const samk_plan*, const samk_grad_stats_args*);

// out[i] = sum_j coefficients[i * lists + j] * list[j] for up to 2 outputs and 3 lists; an output
// may be one of the lists. A missing tensor counts as zero and a zero coefficient never reads.
// With `per_tensor` every tensor has a block of coefficients, one after the other.
typedef struct samk_combine_args {
  samk_list list[3];
  int32_t lists;
  samk_list out[2];
  int32_t outs;
  const double* coefficients;  // device, [outs * lists], or [count * outs * lists]
  int32_t per_tensor;          // 0 or 1
  samk_queue queue;
} samk_combine_args;
SAMK_API int samk_combine(const samk_plan*, const samk_combine_args*);

// out = standard normal numbers, where there is data; see math/normal.h. A number is a function of seed,
// step, number[t] and the element's place in memory: elements 4i to 4i + 3 come from one call of philox. They
// are calculated in fp32, widened to fp64 or rounded once to a half type.
typedef struct samk_noise_args {
  samk_list out;
  uint64_t seed;
  uint32_t step;
  const uint32_t* number;  // by tensor
  samk_queue queue;
} samk_noise_args;
SAMK_API int samk_noise(const samk_plan*, const samk_noise_args*);

// The base optimizer's update, reading the snapshot in place of w where there is one and writing w
// once. A tensor with a snapshot and no gradient is restored; one with neither is left alone.
// If *guard is not finite, or *found_inf is not 0: w = snapshot and nothing else moves, step counters
// included. Where a tensor has a master, that is what is read and updated, and w its rounded copy; the state
// is then fp32 too. In a list of masters a tensor without one is left alone.
typedef struct samk_descend_args {
  samk_list params, grads, snapshots, masters;
  samk_list masks, offsets;  // those of the perturbation
  samk_list state[2];        // SGD: momentum_buffer. Adam: exp_avg, exp_avg_sq.
  float* const* step;        // Adam: torch's 0-d float32 step counters, advanced here; NULL for SGD
  const uint8_t* fresh;      // SGD: 1 where momentum_buffer[t] was just created and takes the gradient
  const int32_t* row;
  const double* table;
  int32_t rule;            // enum samk_rule
  const double* guard;     // NULL, or device scalar
  const float* found_inf;  // NULL, or device scalar
  const float* inv_scale;  // NULL, or device scalar multiplied into every gradient
  void* workspace;
  samk_queue queue;
} samk_descend_args;
SAMK_API int samk_descend(const samk_plan*, const samk_descend_args*);

// ---- selection of masks: the seventh, occasional pass, in three parts ------------------------------------

// scores += g^2 in fp32, where both are there. Scores are fp32 whatever the gradients are.
typedef struct samk_accumulate_args {
  samk_list scores, grads;
  samk_queue queue;
} samk_accumulate_args;
SAMK_API int samk_accumulate(const samk_plan*, const samk_accumulate_args*);

// note: [ranks]
// What is ranked, and among which elements. The rank of a score is the bit pattern of |score| as fp32, which
// orders like |score| itself: 0 to 0x7f800000 for infinity, and 0x7f800001 for every NaN. fp64 scores are
// rounded to fp32. A tensor without scores has zeros. The rank of a random number is the upper 31 bits of
// random_word(seed, step, number[t], element), see math/random.h.
typedef struct samk_ranks {
  samk_list scores;
  int32_t is_random;
  uint64_t seed;
  uint32_t step;
  const uint32_t* number;  // by tensor; NULL unless is_random
  samk_list within;        // absent, or masks: elements whose bit is set take part
  int32_t outside;         // 1: those whose bit is clear do
} samk_ranks;

// Counts ranks: for elements that take part, with rank >> (shift + bits) == prefix,
// counts[(rank >> shift) % 2^bits] += 1. Only tensors with data in `masks` take part. At most 11 bits.
typedef struct samk_count_args {
  samk_ranks ranks;
  samk_list masks;
  int32_t prefix, shift, bits;
  int64_t* counts;  // [2^bits], cleared by the caller
  samk_queue queue;
} samk_count_args;
SAMK_API int samk_count(const samk_plan*, const samk_count_args*);

// Marks elements that take part: the bit is set where rank >> shift > threshold, clear elsewhere. With `add`
// bits are only set. The bits beyond the last element are 0.
// Elements with rank >> shift == threshold are candidates where `candidates` is given: each one adds
// (rank % 2^shift) << 43 | (2^43 - 1 - (position[t] + element)) to the array, in any order, and 1 to *found.
typedef struct samk_mark_args {
  samk_ranks ranks;
  samk_list masks;  // written
  int32_t threshold, shift, add;
  const int64_t* position;  // by tensor, of its first element; NULL without candidates
  int64_t* candidates;
  int64_t capacity;  // what does not fit is counted and not written
  int64_t* found;    // cleared by the caller
  samk_queue queue;
} samk_mark_args;
SAMK_API int samk_mark(const samk_plan*, const samk_mark_args*);

SAMK_API const char* samk_last_error(void);
SAMK_API int samk_abi_version(void);  // SAMK_ABI_VERSION of the library, to be compared with the caller's

// CUDA library only: 0 if that device can run the passes, or non-zero with the reason; and what the library
// was built with.
SAMK_API int samk_check_device(int32_t device);
SAMK_API const char* samk_build_info(void);

// CPU library only: torch's own thread pool, handed in as the addresses of torch_parallel_for and
// torch_get_num_threads (stable C symbols of libtorch_cpu). Without them passes run on the caller.
typedef void (*samk_range_fn)(int64_t begin, int64_t end, void* context);
typedef int32_t (*samk_parallel_for_fn)(int64_t begin, int64_t end, int64_t grain, samk_range_fn,
                                        void* context);
typedef int32_t (*samk_num_threads_fn)(uint32_t* out);
SAMK_API void samk_set_thread_pool(samk_parallel_for_fn, samk_num_threads_fn);

// "avx512", "avx2" or "baseline"; set takes one of them or NULL for the best this machine has and
// fails on one it lacks.
SAMK_API const char* samk_cpu_isa(void);
SAMK_API int samk_set_cpu_isa(const char* name);

#ifdef __cplusplus
}
#endif
#endif  // SAM_KERNELS_H_
