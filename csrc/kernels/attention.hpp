// Attention of several sequences over a store of keys and values, for decoding and for prefill in chunks.
//
// Per (query, head): the keys are cut into blocks of 256, counted from the sequence's first token. Within a block
//   s_j = (q / sqrt(D)) . k_j    in ascending order of the dimensions, one fused multiply-add each
//   m = max s_j;  p_j = exp(s_j - m);  l = sum p_j in sixteen partial sums (j mod 16), folded i + 8, i + 4, i + 2, i + 1
//   o = sum p_j v_j              in ascending order of j
// and blocks are joined in ascending order: M = max(m, m'), o = fma(o, e^(m - M), o' e^(m' - M)), l likewise; the result is o / l.
// Nothing here depends on the thread count, on other sequences, or on which queries share a call: a prompt gives the same bits
// whether it is prefilled at once, in chunks, or token by token.
//
// Keys are turned in registers so that a vector holds one dimension of 16 keys, in pieces of 32 keys that stay in the first-level
// cache and serve all query heads of a group. Products then need no sums across lanes, which cost as much as half of the
// multiply-adds. Values are widened where they lie. While a piece is worked on, the next one is asked
// for, line by line between the multiply-adds.
// Bytes moved by one decoded token: all keys and values of its sequence. Multiply-adds: 2 N D per key, which bounds prefill.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ernie45 {

enum class KvType { kFloat32, kBfloat16, kInt8 };

// Keys, or values, of one layer in pages: address of (page, head, slot) = base + page * page_stride + head * head_stride + slot * D, in
// elements. int8: value = integer * scale, with one scale per slot and head at scales + page * scale_page_stride + ..
struct KvHalf {
    void* base = nullptr;
    std::ptrdiff_t page_stride = 0, head_stride = 0;
    float* scales = nullptr;  // int8 only
    std::ptrdiff_t scale_page_stride = 0, scale_head_stride = 0;
};

// A contiguous cache is one page of `capacity` slots.
struct KvStore {
    KvType type = KvType::kFloat32;
    KvHalf keys, values;
    std::size_t pages = 0, heads = 0, slots = 0, head_dim = 0;
};

// Where the sequences of a step keep their keys and values: all in one store, such as a page pool, or each in one of its own. Heads and
// head size are the same in all of them; type, pages and slots may differ.
struct KvStores {
    const KvStore* const* each = nullptr;
    std::size_t count = 0;  // 1, or that of the sequences

    std::size_t heads() const { return each[0]->heads; }
    std::size_t head_dim() const { return each[0]->head_dim; }
    const KvStore& of(std::size_t sequence) const { return *each[count == 1 ? 0 : sequence]; }
};

// The sequences of a step; their new tokens are packed one behind the other.
struct Sequences {
    std::size_t count = 0;
    const std::int32_t* fresh = nullptr;    // (count) new tokens of each
    const std::int32_t* lengths = nullptr;  // (count) tokens of each, the new ones included
    const std::int32_t* pages = nullptr;    // (count, pages_per_sequence) page of tokens 0 .. slots - 1, of the next `slots`, ..
    std::size_t pages_per_sequence = 0;
};

constexpr std::size_t kMaxHeadDim = 256;  // and a multiple of 16

// out (T, query_heads, D) = attention of q (T, query_heads, D), float32. Query i of the n new ones of a sequence sees its first
// length - n + i + 1 keys.
void attention(const float* q, std::size_t query_heads, const KvStores& stores, const Sequences& sequences, float scale, float* out);

// rope_append (elementwise.hpp) and attention one after the other; the rotated queries stay in memory of the calling thread.
void attend(const float* qkv, std::size_t query_heads, const float* rotation, const KvStores& stores, const Sequences& sequences,
            float scale, float* out);

constexpr std::size_t kBlock = 256;   // keys of a block
constexpr std::size_t kPiece = 32;    // keys that are turned or widened together: 16 KB at D = 128
constexpr std::size_t kTileRows = 8;  // rows of a tile, a row being one query of one head

// Keys, or values, of one head, one by one. Behind those in question follow kPiece more that can be read: the ones needed next.
struct KvRows {
    KvType type = KvType::kFloat32;
    const void* const* at = nullptr;
    const float* scales = nullptr;  // int8 only
    bool ahead = false;             // ask for what follows kPiece later

    KvRows from(std::size_t key) const { return {type, at + key, scales + key, ahead}; }
};

// What differs by instruction set. Queries and scores are arrays of rows with a fixed distance (kMaxHeadDim and kBlock), so that
// one register addresses all rows of a tile.
struct AttentionKernels {
    void (*widen_int8)(const std::int8_t* x, float scale, std::size_t count, float* out);
    // packed (count / 16, dim, 16) = keys; count is a multiple of 16, dim too.
    void (*pack)(const KvRows& keys, std::size_t count, std::size_t dim, float* packed);
    // scores (rows, count) of packed keys, at most kPiece. `keys` are those that were packed, for what comes after them.
    void (*score)(const float* q, std::size_t rows, const float* packed, const KvRows& keys, std::size_t count, std::size_t dim,
                  float* scores);
    // One row: scores of the first `keys` become p, those from there to `end` become 0; there is room for a multiple of 16.
    void (*softmax)(float* scores, std::size_t keys, std::size_t end, float* maximum, float* sum);
    // o (rows, dim) = sum over keys of p * v, added to what is there unless `begin`. `end`: this was the last call for these rows;
    // before, columns may lie in another order.
    void (*weigh)(const float* p, std::size_t rows, const KvRows& values, std::size_t keys, std::size_t dim, bool begin, bool end,
                  float* o);
    // Joins a block's maxima, sums (8 each) and o (rows, dim) to those of the blocks before.
    void (*join)(const float* block_maxima, const float* block_sums, const float* block_o, std::size_t rows, std::size_t dim,
                 float* maxima, float* sums, float* o);
    // out = o / sum
    void (*finish)(const float* o, float sum, std::size_t dim, float* out);
    // The router's: tile (keys, 8) = k (keys, dim) . q (rows, dim), any dim: sixteen partial sums over the dimensions (lane i takes
    // i, i + 16, ..), folded i + 8, i + 4, i + 2, i + 1.
    void (*dots)(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* tile);
};

const AttentionKernels& baseline_attention();
const AttentionKernels& avx2_attention();
const AttentionKernels& avx512_attention();
const AttentionKernels& attention_kernels();

}  // namespace ernie45
