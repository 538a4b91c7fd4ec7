// Turning keys, products and weighted sums in vector registers, written once. The including file defines before
//   Vector of kWidth floats; zero, read, write, broadcast, times, madd (a b + c); keep, which holds a value in a register
//   read_quarters(at, offset): 16 bytes of the rows 0, 4, .., one per quarter; low_singles .. high_doubles: unpack within quarters
//   even, odd: bfloat16 pairs to float32; join_even_odd back in order; signed_byte, read_bytes, read_bfloat16: to float32
//   kScoreGroups, pass_rows, weigh_pairs: what fits into the registers
// Loops over the sums are unrolled by order: left to itself, GCC keeps the sums in memory.
#pragma once

#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

constexpr std::size_t kLine = 64;

// Asks for the lines of rows one by one, in their order: by columns, as the values are read, one thread took up to 10 % longer; keys
// 64 instead of 32 ahead, 7 %; without asking, 70 %. To the second-level cache: to the first was no faster.
struct Ask {
    const void* const* at;
    std::size_t row_bytes, byte = 0;

    void next() {
        _mm_prefetch(static_cast<const char*>(*at) + byte, _MM_HINT_T1);
        byte += kLine;
        const bool ends = byte >= row_bytes;
        at += ends;
        byte = ends ? 0 : byte;
    }
};

// Calls body(std::integral_constant<std::size_t, rows>).
template <typename Body>
inline void with_rows(std::size_t rows, const Body& body) {
    switch (rows) {
        case 1: return body(std::integral_constant<std::size_t, 1>());
        case 2: return body(std::integral_constant<std::size_t, 2>());
        case 3: return body(std::integral_constant<std::size_t, 3>());
        case 4: return body(std::integral_constant<std::size_t, 4>());
        case 5: return body(std::integral_constant<std::size_t, 5>());
        case 6: return body(std::integral_constant<std::size_t, 6>());
        case 7: return body(std::integral_constant<std::size_t, pass_rows(7)>());
        default: return body(std::integral_constant<std::size_t, pass_rows(8)>());
    }
}

// Each pass takes as many rows as its sums fit into the registers.
template <typename Body>
inline void for_passes(std::size_t rows, const Body& body) {
    for (std::size_t row = 0; row < rows; row += pass_rows(rows - row)) {
        with_rows(pass_rows(rows - row), [&](auto count) { body(row, count); });
    }
}

// 4 bytes of kWidth keys to 1, 2 or 4 dimensions.
template <KvType Type>
[[gnu::always_inline]] inline void write_dimensions(Vector bytes, const float* scales, float* packed) {
    if constexpr (Type == KvType::kFloat32) {
        write(packed, bytes);
    } else if constexpr (Type == KvType::kBfloat16) {
        write(packed, even(bytes));
        write(packed + kLanes, odd(bytes));
    } else {
        const Vector scale = read(scales);
        write(packed, times(signed_byte<0>(bytes), scale));
        write(packed + kLanes, times(signed_byte<1>(bytes), scale));
        write(packed + 2 * kLanes, times(signed_byte<2>(bytes), scale));
        write(packed + 3 * kLanes, times(signed_byte<3>(bytes), scale));
    }
}

// kWidth keys, 16 bytes of each at a time: a 4 x 4 transposition within the quarters of four vectors.
template <KvType Type>
void pack_keys(const void* const* at, const float* scales, std::size_t dim, float* packed) {
    constexpr std::size_t kBytes = element_bytes(Type), kDims = sizeof(float) / kBytes;
    for (std::size_t d = 0; d < dim; d += 4 * kDims) {
        const Vector a = read_quarters(at, d * kBytes), b = read_quarters(at + 1, d * kBytes);
        const Vector c = read_quarters(at + 2, d * kBytes), e = read_quarters(at + 3, d * kBytes);
        const Vector ab = low_singles(a, b), ce = low_singles(c, e), ab_high = high_singles(a, b), ce_high = high_singles(c, e);
        float* to = packed + d * kLanes;
        write_dimensions<Type>(low_doubles(ab, ce), scales, to);
        write_dimensions<Type>(high_doubles(ab, ce), scales, to + kDims * kLanes);
        write_dimensions<Type>(low_doubles(ab_high, ce_high), scales, to + 2 * kDims * kLanes);
        write_dimensions<Type>(high_doubles(ab_high, ce_high), scales, to + 3 * kDims * kLanes);
    }
}

void pack(const KvRows& keys, std::size_t count, std::size_t dim, float* packed) {
    with_type(keys.type, [&](auto type) {
        for (std::size_t key = 0; key < count; key += kWidth) {
            pack_keys<type.value>(keys.at + key, keys.scales + key, dim, packed + key / kLanes * kLanes * dim + key % kLanes);
        }
    });
}

// Rows x Groups x 16 products. The lines of the keys kPiece later are asked for in as many steps as a group has keys.
template <std::size_t Rows, std::size_t Groups>
void score_tile(const float* q, const float* packed, const void* const* ahead, std::size_t row_bytes, std::size_t dim,
                float* scores) {
    constexpr std::size_t kVectors = Groups * kLanes / kWidth;
    Vector sums[Rows][kVectors];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kVectors; ++i) sums[r][i] = zero();
    }
    for (std::size_t step = 0, d = 0; step < kLanes; ++step) {
        if (ahead != nullptr) {
#pragma GCC unroll 2
            for (std::size_t i = 0; i < Groups; ++i) {
                const char* row = static_cast<const char*>(ahead[Groups * step + i]);
                for (std::size_t byte = 0; byte < row_bytes; byte += kLine) _mm_prefetch(row + byte, _MM_HINT_T1);
            }
        }
        for (const std::size_t end = d + dim / kLanes; d < end; ++d) {
            Vector key[kVectors];
#pragma GCC unroll 16
            for (std::size_t i = 0; i < kVectors; ++i) {
                key[i] = read(packed + (i * kWidth / kLanes * dim + d) * kLanes + i * kWidth % kLanes);
            }
#pragma GCC unroll 16
            for (std::size_t r = 0; r < Rows; ++r) {
                Vector query = broadcast(q[r * kMaxHeadDim + d]);
                keep(query);  // loaded once, not once per vector
#pragma GCC unroll 16
                for (std::size_t i = 0; i < kVectors; ++i) sums[r][i] = madd(query, key[i], sums[r][i]);
            }
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kVectors; ++i) write(scores + r * kBlock + i * kWidth, sums[r][i]);
    }
}

void score(const float* q, std::size_t rows, const float* packed, const KvRows& keys, std::size_t count, std::size_t dim,
           float* scores) {
    const std::size_t row_bytes = dim * element_bytes(keys.type);
    for_passes(rows, [&](std::size_t row, auto pass) {
        const bool asks = keys.ahead && row == 0;
        std::size_t key = 0;
        const auto some = [&](auto groups) {
            for (; key + groups.value * kLanes <= count; key += groups.value * kLanes) {
                const void* const* ahead = asks ? keys.at + key + kPiece : nullptr;
                score_tile<pass.value, groups.value>(q + row * kMaxHeadDim, packed + key * dim, ahead, row_bytes, dim,
                                                     scores + row * kBlock + key);
            }
        };
        some(std::integral_constant<std::size_t, kScoreGroups>());
        if constexpr (kScoreGroups > 1) some(std::integral_constant<std::size_t, 1>());
    });
}

// Columns of one row of values as Count vectors; bfloat16 in pairs of even and odd ones, which needs no shuffles.
template <KvType Type, std::size_t Count>
[[gnu::always_inline]] inline void read_columns(const void* at, std::size_t column, const float* scale, Vector* out) {
    const char* from = static_cast<const char*>(at) + column * element_bytes(Type);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Count; ++i) {
        const char* here = from + i * kWidth * element_bytes(Type);
        if constexpr (Type == KvType::kFloat32) {
            out[i] = read(reinterpret_cast<const float*>(here));
        } else if constexpr (Type == KvType::kInt8) {
            out[i] = times(read_bytes(here), broadcast(*scale));
        } else if constexpr (Count == 1) {
            out[i] = read_bfloat16(here);
        } else if (i % 2 == 0) {
            Vector pairs = read(reinterpret_cast<const float*>(here));
            keep(pairs);  // loaded once, not for even and odd ones
            out[i] = even(pairs);
            out[i + 1] = odd(pairs);
        }
    }
}

// Rows x Count vectors of the output from a column on.
template <KvType Type, std::size_t Rows, std::size_t Count>
void weigh_tile(const float* p, const KvRows& values, Ask& ask, std::size_t keys, std::size_t column, std::size_t dim, bool begin,
                bool end, float* o) {
    Vector sums[Rows][Count];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Count; ++i) sums[r][i] = begin ? zero() : read(o + r * dim + column + i * kWidth);
    }
    constexpr std::size_t kBytes = Count * kWidth * element_bytes(Type);
    for (std::size_t key = 0; key < keys; ++key) {
        if (values.ahead && (kBytes >= kLine || key % (kLine / kBytes) == 0)) {
#pragma GCC unroll 8
            for (std::size_t byte = 0; byte < kBytes; byte += kLine) ask.next();
        }
        Vector value[Count];
        read_columns<Type, Count>(values.at[key], column, values.scales + key, value);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < Rows; ++r) {
            Vector weight = broadcast(p[r * kBlock + key]);
            keep(weight);
#pragma GCC unroll 16
            for (std::size_t i = 0; i < Count; ++i) sums[r][i] = madd(weight, value[i], sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
        if (Type == KvType::kBfloat16 && Count > 1 && end) {
#pragma GCC unroll 16
            for (std::size_t i = 0; i + 1 < Count; i += 2) join_even_odd(sums[r][i], sums[r][i + 1]);
        }
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Count; ++i) write(o + r * dim + column + i * kWidth, sums[r][i]);
    }
}

void weigh(const float* p, std::size_t rows, const KvRows& values, std::size_t keys, std::size_t dim, bool begin, bool end,
           float* o) {
    with_type(values.type, [&](auto type) {
        for_passes(rows, [&](std::size_t row, auto pass) {
            KvRows here = values;
            here.ahead = values.ahead && row == 0;
            Ask ask{values.at + kPiece, dim * element_bytes(values.type)};
            std::size_t column = 0;
            const auto some = [&](auto count) {
                for (; column + count.value * kWidth <= dim; column += count.value * kWidth) {
                    weigh_tile<type.value, pass.value, count.value>(p + row * kBlock, here, ask, keys, column, dim, begin, end,
                                                                     o + row * dim);
                }
            };
            constexpr std::size_t kPairs = weigh_pairs(pass.value);
            some(std::integral_constant<std::size_t, 2 * kPairs>());
            if constexpr (kPairs > 1) some(std::integral_constant<std::size_t, 2>());
            if constexpr (kWidth == kLanes) some(std::integral_constant<std::size_t, 1>());
        });
    });
}

}  // namespace
}  // namespace ernie45
