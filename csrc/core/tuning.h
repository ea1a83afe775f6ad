// The constants that decide how fast memory is reached on a device, with what they are unless a build says
// otherwise: cmake -DSAMK_CUDA_TUNING="SAMK_THREADS=512;SAMK_COPY_LOADS=8". No result depends on them, except
// for the order of sums, which SAMK_THREADS and the chunks decide. bench/gpu/variants.py builds and measures
// libraries with other values.
#ifndef SAM_KERNELS_CORE_TUNING_H_
#define SAM_KERNELS_CORE_TUNING_H_

// Threads of a block; a power of two.
#ifndef SAMK_THREADS
#define SAMK_THREADS 256
#endif

// Blocks that share a multiprocessor, so many are launched for each. A thread may have 65,536 registers over
// their threads together: 64, 80 and 128. MIDDLE and HEAVY are for kernels that call functions, or hold wide
// packs from several lists; see descend.cu.
#ifndef SAMK_BLOCKS
#define SAMK_BLOCKS (1024 / SAMK_THREADS)
#endif
#ifndef SAMK_BLOCKS_MIDDLE
#define SAMK_BLOCKS_MIDDLE (768 / SAMK_THREADS)
#endif
#ifndef SAMK_BLOCKS_HEAVY
#define SAMK_BLOCKS_HEAVY (512 / SAMK_THREADS)
#endif

// The same for the passes of every step alone. Of descend, the kernels of fp32 and those of half weights
// without masters.
#ifndef SAMK_NORM_BLOCKS
#define SAMK_NORM_BLOCKS SAMK_BLOCKS
#endif
#ifndef SAMK_PERTURB_BLOCKS
#define SAMK_PERTURB_BLOCKS SAMK_BLOCKS
#endif
#ifndef SAMK_COPY_BLOCKS
#define SAMK_COPY_BLOCKS SAMK_BLOCKS
#endif
#ifndef SAMK_DESCEND_BLOCKS
#define SAMK_DESCEND_BLOCKS SAMK_BLOCKS
#endif
#ifndef SAMK_DESCEND_HALF_BLOCKS
#define SAMK_DESCEND_HALF_BLOCKS SAMK_BLOCKS_MIDDLE
#endif

// Packs of 16 bytes of the narrowest list that a thread reads from every list before it writes or adds one.
// DESCEND multiplies what descend.cu says for each pair of types; COMBINE is for kernels of one output.
#ifndef SAMK_NORM_LOADS
#define SAMK_NORM_LOADS 4
#endif
#ifndef SAMK_PERTURB_LOADS
#define SAMK_PERTURB_LOADS 2
#endif
#ifndef SAMK_COPY_LOADS
#define SAMK_COPY_LOADS 4
#endif
#ifndef SAMK_COMBINE_LOADS
#define SAMK_COMBINE_LOADS 2
#endif
#ifndef SAMK_DESCEND_LOADS
#define SAMK_DESCEND_LOADS 1
#endif

// What should be under way to a multiprocessor's threads at any time, so that memory never waits: what CUB
// asks for on an H200. An H100 needs 32 KB, an A100 16, a B200 64. It decides the loads under masks, and
// descend.cu does not compile with less.
#ifndef SAMK_BYTES_IN_FLIGHT
#define SAMK_BYTES_IN_FLIGHT 49152
#endif

// How a list is cut: into chunks of the power of two that makes about so many of them, within bounds. Never
// by the card, or sums would depend on it. A chunk begins at a word of 64 elements, and a tail fits 16 bits.
#ifndef SAMK_CHUNKS
#define SAMK_CHUNKS 1024
#endif
#ifndef SAMK_CHUNK_LEAST
#define SAMK_CHUNK_LEAST 2048
#endif
#ifndef SAMK_CHUNK_MOST
#define SAMK_CHUNK_MOST 65536
#endif

// 1 where a list is stored with the hint that nobody reads it soon (st.global.cs), so that it leaves the L2
// before what is read again: the snapshot, which a whole backward pass separates from its reader, and the
// weights that perturb, restore and descend write.
#ifndef SAMK_STREAM_SNAPSHOT
#define SAMK_STREAM_SNAPSHOT 0
#endif
#ifndef SAMK_STREAM_WEIGHTS
#define SAMK_STREAM_WEIGHTS 0
#endif

// 1 where a pass goes through the chunks from the last to the first. The norm has just read the last
// gradients when perturb begins; a backward pass has just written those of the first layers when descend
// does.
#ifndef SAMK_PERTURB_BACKWARD
#define SAMK_PERTURB_BACKWARD 1
#endif
#ifndef SAMK_DESCEND_BACKWARD
#define SAMK_DESCEND_BACKWARD 0
#endif

static_assert(SAMK_THREADS >= 64 && SAMK_THREADS <= 1024 && (SAMK_THREADS & (SAMK_THREADS - 1)) == 0,
              "a round of a block is whole words of a mask");
static_assert(SAMK_BLOCKS >= 1 && SAMK_BLOCKS_MIDDLE >= 1 && SAMK_BLOCKS_HEAVY >= 1,
              "no block would be left");
static_assert(SAMK_CHUNKS >= 1 && SAMK_CHUNK_LEAST >= 64 && SAMK_CHUNK_LEAST <= SAMK_CHUNK_MOST &&
                  SAMK_CHUNK_MOST <= 65536 && (SAMK_CHUNK_LEAST & (SAMK_CHUNK_LEAST - 1)) == 0 &&
                  (SAMK_CHUNK_MOST & (SAMK_CHUNK_MOST - 1)) == 0,
              "chunks are powers of two from 64 to 65,536 elements");

#endif  // SAM_KERNELS_CORE_TUNING_H_
