// Products of bf16 matrices on tensor cores, sums in f32.
//
//   gemm_nt      c (m,n) bf16 = or += a (m,k) · b (n,k)ᵀ + a2 (m,k2) · b2 (n,k2)ᵀ
//   gemm_nt_f32  the same into f32
//   gemm_nn      c (m,n) bf16 = or += a (m,k) · b (k,n) + a2 (m,k2) · b2 (k2,n)
//   *_small      the same by smaller tiles, for products that would not fill the device
//   gemm_tn_partial  partial (ceil(k/split),m,n) f32 = aᵀ · b of each `split` rows of a (k,m), b (k,n)
//   add_partials c (n) f32 += scale * the sum of partial (splits,n), in order
//
// The second pair carries LoRA: the sums go on over its depth, k2 = 0 for none. Matrices are row-major, rows `ld`
// values apart. Rows on 16 bytes come by cp.async; others value by value, several times slower. add != 0 adds to
// c. A sum goes down its depth in steps of 16 whatever the tile: both sizes give the same bits, and the device may
// choose.
//
//   kernel                         grid                                       block  shared (static)
//   gemm_nt, gemm_nt_f32, gemm_nn  ceil(m/128) * ceil(n/128)                  128    49,152
//   *_small                        ceil(m/64) * ceil(n/64)                    128    24,576
//   gemm_tn_partial                x ceil(m/M) * ceil(n/N), z ceil(k/split)   128    36,864
//                                  with (M,N) = (128,64) for m > n, else (64,128)
//   add_partials                   ceil(n/256)                                256    0
//   No dynamic shared memory.
//
// Tiles of c go to blocks in columns of 8, so that the blocks that run together share rows of a and of b in L2. A
// tile of 128x128 reads (m*k*n/64) bytes by way of L2 and does 64 operations for each; four warps of 64x64 read 32
// bytes of shared memory a 1024 multiplications. Bound by tensor cores for k >= 512 or so; on Hopper only wgmma
// reaches the top.
//   v1  three stages of 32 deep in exchanged chunks, one barrier a step, two blocks to a processor; results stored
//       by way of shared memory, in whole sectors. No conflicts; 9.0 instructions of PTX an mma, for each chunk's
//       place and bounds were reckoned anew
//   v2  the exchange of a factor's chunks depends on the lane alone: 5.5
//   v3  a thread keeps where it copies from, and rows beyond the last are the last again: 4.3 (3.3 in sm_90 code)
// Results that cross lanes by shuffles took twice the PTX for the same sectors.
#include "common.cuh"
#include "panel.cuh"

constexpr int THREADS = 128;
constexpr int DEPTH = 32;
constexpr int STAGES = 3;
constexpr int GROUP = 8;        // rows of tiles that are walked together

// Which factor lies with its depth along rows, and which down columns.
enum Layout { NT, NN, TN };

DEVICE void put(float* to, float x, int add) { *to = add ? *to + x : x; }
DEVICE void put(bf16* to, float x, int add) { *to = to_bf16(add ? to_f32(*to) + x : x); }
DEVICE void put_four(float* to, float4 x, int add) {
    float4 old = add ? *(const float4*)to : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    *(float4*)to = make_float4(old.x + x.x, old.y + x.y, old.z + x.z, old.w + x.w);
}
DEVICE void put_four(bf16* to, float4 x, int add) {
    uint2 old = add ? *(const uint2*)to : make_uint2(0, 0);
    *(uint2*)to = make_uint2(to_bf16x2(low_f32(old.x) + x.x, high_f32(old.x) + x.y),
                             to_bf16x2(low_f32(old.y) + x.z, high_f32(old.y) + x.w));
}

// One factor of a tile: EXTENT of its rows (or columns) by DEPTH, in panels that lie along the depth or, DOWN,
// across it.
template <int EXTENT, bool LEFT, bool DOWN> struct Side {
    static constexpr int ROWS = DOWN ? DEPTH : EXTENT, COLS = DOWN ? EXTENT : DEPTH;
    typedef Panel<ROWS, COLS> Block;
    static constexpr int STEP = THREADS / Block::CHUNKS, TURNS = ROWS / STEP;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread's chunks are exchanged alike");

    // What this thread brings. Rows beyond the matrix's last are that one again: their sums are not stored.
    const bf16* at;
    int distances[TURNS];
    int bytes;              // of a chunk, where it does not depend on the depth
    int left;               // of the depth, from the thread's first value on

    // Panels of `from` begin at `first` and reach from `depth` to `end`.
    DEVICE void begin(const Operand& from, int first, int depth, int end) {
        int row = threadIdx.x / Block::CHUNKS, col = threadIdx.x % Block::CHUNKS * 8;
        bytes = DOWN ? 2 * max(0, min(8, from.cols - first - col)) : 16;
        left = end - depth - (DOWN ? row : col);
        int across = DOWN ? (bytes > 0 ? first + col : 0) : first;
        at = from.at + (i64)(DOWN ? depth + row : across) * from.ld + (DOWN ? across : depth + col);
#pragma unroll
        for (int i = 0; i < TURNS; i++)
            distances[i] = (DOWN ? i * STEP : min(row + i * STEP, from.rows - 1 - first)) * from.ld;
    }

    // Brings the next panel.
    DEVICE void bring(bf16* panel, int ld) {
        bf16* to = panel + Block::chunk_at(threadIdx.x / Block::CHUNKS, threadIdx.x % Block::CHUNKS);
        int here = DOWN ? bytes : 2 * max(0, min(8, left));
#pragma unroll
        for (int i = 0; i < TURNS; i++)
            copy_async(to + i * STEP * COLS, at + distances[i], !DOWN || i * STEP < left ? here : 0);
        at += DOWN ? (i64)DEPTH * ld : DEPTH;
        left -= DEPTH;
    }

    // The same value by value, for rows that are not aligned; `beyond` is the end across the depth.
    DEVICE static void bring_slowly(bf16* panel, const bf16* from, int ld, int first, int beyond, int depth,
                                    int end) {
#pragma unroll 4
        for (int i = threadIdx.x; i < Block::SIZE; i += THREADS) {
            int row = i / COLS, col = i % COLS;
            int across = first + (DOWN ? col : row), down = depth + (DOWN ? row : col);
            i64 place = DOWN ? (i64)down * ld + across : (i64)across * ld + down;
            panel[Block::chunk_at(row, col / 8) + col % 8] = down < end && across < beyond ? from[place] : bf16{0};
        }
    }

    // Where this lane's row of a factor's four squares begins in a panel, in bytes, for a warp that begins at
    // `across`.
    DEVICE static u32 lane_at(int across) {
        int lane = threadIdx.x % WARP;
        bool sixteen = LEFT != DOWN;
        int row = sixteen ? lane % 16 : lane / 16 * 8 + lane % 8, chunk = sixteen ? lane / 16 : lane / 8 % 2;
        return 2 * (DOWN ? Block::chunk_at(row, across / 8 + chunk) : Block::chunk_at(row, chunk) + across * COLS);
    }

    // The factor at (across,depth), counted from the warp's first; `lane` is where the lane's row of that lies. An
    // exchange of chunks is an exclusive or, so that other chunks of the row are one too.
    DEVICE static void factor(u32 (&squares)[4], u32 lane, int across, int depth) {
        if (DOWN) load_matrices_transposed(squares, (lane ^ across * 2) + depth * COLS * 2);
        else load_matrices(squares, (lane ^ depth * 2) + across * COLS * 2);
    }
};

// The tile (M,N) of a product that a block computes.
template <int M, int N, Layout LAYOUT> struct Tile {
    static constexpr bool A_DOWN = LAYOUT == TN, B_DOWN = LAYOUT != NT;
    typedef Side<M, true, A_DOWN> A;
    typedef Side<N, false, B_DOWN> B;
    static constexpr int STAGE = A::Block::SIZE + B::Block::SIZE;
    static constexpr int ROWS = M / 32, COLS = N / 16;      // of a warp, in steps of an mma: 2 by 2 warps

    float sums[ROWS][COLS][4];

    // One stage. `a_lane` and `b_lane` are where the lane's rows lie in it.
    DEVICE void multiply(u32 a_lane, u32 b_lane) {
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth += 16) {
            u32 a[ROWS][4], b[COLS / 2][4];
#pragma unroll
            for (int i = 0; i < ROWS; i++) A::factor(a[i], a_lane, i * 16, depth);
#pragma unroll
            for (int j = 0; j < COLS; j += 2) B::factor(b[j / 2], b_lane, j * 8, depth);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++) {
                    u32 right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    mma_m16n8k16(sums[i][j], a[i], right);
                }
        }
    }

    // The sums at (row,col) of a · b over their depths from..to, then on over a2 · b2 of depth k2.
    DEVICE void run(bf16* stages, const Operand& a, const Operand& b, int from, int to, const Operand& a2,
                    const Operand& b2, int k2, int row, int col) {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++)
#pragma unroll
                for (int l = 0; l < 4; l++) sums[i][j][l] = 0.0f;
        int m = A_DOWN ? a.cols : a.rows, n = B_DOWN ? b.cols : b.rows;
        int own = (to - from + DEPTH - 1) / DEPTH;
        int steps = own + (k2 + DEPTH - 1) / DEPTH;
        bool a_aligned = a.aligned, b_aligned = b.aligned;
        int a_ld = a.ld, b_ld = b.ld;
        A left;
        B right;
        left.begin(a, row, from, to);
        right.begin(b, col, from, to);
        u32 a_lane = shared_address(stages) + A::lane_at(row_of(0));
        u32 b_lane = shared_address(stages + A::Block::SIZE) + B::lane_at(col_of(0));
        int filled = 0, read = 0;
#pragma unroll 1
        for (int step = 1 - STAGES; step < steps; step++) {
            if (step >= 0) {
                wait_for_copies<STAGES - 2>();
                // The stage is there for all, and all are done with the one before it, which is filled next.
                __syncthreads();
            }
            int next = step + STAGES - 1;
            if (next == own) {
                left.begin(a2, row, 0, k2);
                right.begin(b2, col, 0, k2);
                a_aligned = a2.aligned, b_aligned = b2.aligned;
                a_ld = a2.ld, b_ld = b2.ld;
            }
            if (next < steps) {
                bf16* stage = stages + filled;
                bool first = next < own;
                int depth = first ? from + next * DEPTH : (next - own) * DEPTH, end = first ? to : k2;
                if (a_aligned) left.bring(stage, a_ld);
                else A::bring_slowly(stage, first ? a.at : a2.at, a_ld, row, m, depth, end);
                if (b_aligned) right.bring(stage + A::Block::SIZE, b_ld);
                else B::bring_slowly(stage + A::Block::SIZE, first ? b.at : b2.at, b_ld, col, n, depth, end);
            }
            commit_copies();
            filled = filled == (STAGES - 1) * STAGE ? 0 : filled + STAGE;
            if (step < 0) continue;
            multiply(a_lane + read * 2, b_lane + read * 2);
            read = read == (STAGES - 1) * STAGE ? 0 : read + STAGE;
        }
    }

    // Where sums[i][j] lie in the tile.
    DEVICE static int row_of(int i) { return threadIdx.x / WARP % 2 * (M / 2) + i * 16; }
    DEVICE static int col_of(int j) { return threadIdx.x / WARP / 2 * (N / 2) + j * 8; }

    // c (m,n) at (row,col) = or += the sums: 16 rows of each warp at a time by way of shared memory, so that whole
    // sectors are written. The padding keeps the rows of an mma's result in different banks.
    template <typename To>
    DEVICE void store(bf16* stages, To* c, int ldc, int m, int n, int row, int col, int add) {
        constexpr int LINE = N + 8;
        static_assert(32 * LINE * 4 <= STAGES * STAGE * 2, "fits the stages");
        float* lines = (float*)stages;
        int lane = threadIdx.x % WARP, upper = threadIdx.x / WARP % 2;
        bool in_fours = (u64)c % (4 * sizeof(To)) == 0 && ldc % 4 == 0 && col + N <= n;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            __syncthreads();
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                float* line = lines + (upper * 16 + lane / 4) * LINE + col_of(j) + lane % 4 * 2;
                *(float2*)line = make_float2(sums[i][j][0], sums[i][j][1]);
                *(float2*)(line + 8 * LINE) = make_float2(sums[i][j][2], sums[i][j][3]);
            }
            __syncthreads();
            if (in_fours) {
#pragma unroll 4
                for (int index = threadIdx.x; index < 32 * (N / 4); index += THREADS) {
                    int line = index / (N / 4), within = index % (N / 4) * 4;
                    int at_row = row + line / 16 * (M / 2) + i * 16 + line % 16;
                    if (at_row >= m) continue;
                    float4 four = *(const float4*)(lines + line * LINE + within);
                    put_four(c + (i64)at_row * ldc + col + within, four, add);
                }
            } else {
#pragma unroll 1
                for (int index = threadIdx.x; index < 32 * N; index += THREADS) {
                    int line = index / N, within = index % N;
                    int at_row = row + line / 16 * (M / 2) + i * 16 + line % 16;
                    if (at_row < m && col + within < n)
                        put(c + (i64)at_row * ldc + col + within, lines[line * LINE + within], add);
                }
            }
        }
    }
};

// Which tile a block has: down GROUP rows of tiles, then the next column.
template <int M, int N> DEVICE void place(int m, int n, int& row, int& col) {
    int rows = (m + M - 1) / M, cols = (n + N - 1) / N;
    int group = blockIdx.x / (GROUP * cols), within = blockIdx.x % (GROUP * cols);
    int height = min(GROUP, rows - group * GROUP);
    row = (group * GROUP + within % height) * M;
    col = within / height * N;
}

#define GEMM(NAME, OUT, M, N, LAYOUT)                                                                             \
    KERNEL __launch_bounds__(THREADS, 2)                                                                          \
        NAME(OUT* c, int ldc, const bf16* a, int lda, const bf16* b, int ldb, const bf16* a2, int lda2,           \
             const bf16* b2, int ldb2, int m, int n, int k, int k2, int add) {                                    \
        __shared__ __align__(128) bf16 stages[STAGES * Tile<M, N, LAYOUT>::STAGE];                                \
        int row, col;                                                                                             \
        place<M, N>(m, n, row, col);                                                                              \
        Tile<M, N, LAYOUT> tile;                                                                                  \
        bool down = Tile<M, N, LAYOUT>::B_DOWN;                                                                   \
        Operand right = down ? operand(b, ldb, k, n) : operand(b, ldb, n, k);                                     \
        Operand right2 = down ? operand(b2, ldb2, k2, n) : operand(b2, ldb2, n, k2);                              \
        tile.run(stages, operand(a, lda, m, k), right, 0, k, operand(a2, lda2, m, k2), right2, k2, row, col);     \
        tile.store(stages, c, ldc, m, n, row, col, add);                                                          \
    }

GEMM(gemm_nt, bf16, 128, 128, NT)
GEMM(gemm_nt_small, bf16, 64, 64, NT)
GEMM(gemm_nt_f32, float, 128, 128, NT)
GEMM(gemm_nt_f32_small, float, 64, 64, NT)
GEMM(gemm_nn, bf16, 128, 128, NN)
GEMM(gemm_nn_small, bf16, 64, 64, NN)

template <int M, int N>
DEVICE void transposed_product(bf16* stages, float* partial, const bf16* a, int lda, const bf16* b, int ldb, int m,
                               int n, int k, int split) {
    int row, col;
    place<M, N>(m, n, row, col);
    int from = blockIdx.z * split, to = min(k, from + split);
    Tile<M, N, TN> tile;
    Operand none = {};
    tile.run(stages, operand(a, lda, to, m), operand(b, ldb, to, n), from, to, none, none, 0, row, col);
    tile.store(stages, partial + (i64)blockIdx.z * m * n, n, m, n, row, col, 0);
}

// One of m and n is a rank: a tile is as wide as ranks mostly are, and the other matrix is read once. Bound by
// that.
KERNEL __launch_bounds__(THREADS, 3)
    gemm_tn_partial(float* partial, const bf16* a, int lda, const bf16* b, int ldb, int m, int n, int k,
                    int split) {
    __shared__ __align__(128) bf16 stages[STAGES * Tile<128, 64, TN>::STAGE];
    if (m > n) transposed_product<128, 64>(stages, partial, a, lda, b, ldb, m, n, k, split);
    else transposed_product<64, 128>(stages, partial, a, lda, b, ldb, m, n, k, split);
}

KERNEL add_partials(float* c, const float* partial, float scale, i64 n, int splits) {
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    float sum = partial[at];
    for (int split = 1; split < splits; split++) sum += partial[at + split * n];
    c[at] += scale * sum;
}
