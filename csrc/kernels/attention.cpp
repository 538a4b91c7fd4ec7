// Division of the work and the walk over blocks and pages; everything hot is behind attention_kernels(). See attention.hpp for the
// arithmetic.
#include "kernels/attention.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/aligned.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/isa.hpp"
#include "kernels/thread_pool.hpp"

namespace ernie45 {
namespace {

constexpr std::size_t kBlock = 256;  // keys of a block
constexpr std::size_t kPiece = 32;   // keys that are widened together: 16 KB at D = 128
constexpr std::size_t kRows = 128;   // rows of a unit, so that a widened piece serves many
// A unit that costs more than this share of a thread's work is divided by blocks.
constexpr std::size_t kUnitsPerThread = 4;

constexpr float kNone = -std::numeric_limits<float>::infinity();

std::size_t divide_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit; }

// Some queries of one sequence with the query heads of one key/value head: rows (query, head).
struct Unit {
    std::size_t sequence, head;
    std::size_t first_token, queries;  // of the packed queries
    std::size_t visible;               // keys that the first of them sees; each following one sees one more
    std::size_t rows, heads_per_group;
    std::size_t partial;  // where its partial results begin, if it is divided
    bool divided;

    std::size_t keys() const { return visible + queries - 1; }
    std::size_t blocks() const { return divide_up(keys(), kBlock); }
    std::size_t tiles() const { return divide_up(rows, kTileRows); }
    std::size_t cost() const { return tiles() * keys(); }
    std::size_t tile_rows(std::size_t tile) const { return std::min(kTileRows, rows - tile * kTileRows); }
    // Keys of the block from `start` on that a row sees.
    std::size_t row_keys(std::size_t row, std::size_t start) const {
        const std::size_t end = std::min(visible + row / heads_per_group, start + kBlock);
        return end > start ? end - start : 0;
    }
    std::size_t tile_keys(std::size_t tile, std::size_t start) const {
        return row_keys(tile * kTileRows + tile_rows(tile) - 1, start);
    }
};

// Maxima and sums (tiles, 8), o (rows, D): of one block, or of all blocks so far.
struct Part {
    float *maxima, *sums, *o;

    static std::size_t size(const Unit& unit, std::size_t dim) { return 2 * unit.tiles() * kTileRows + unit.rows * dim; }
    Part(float* memory, const Unit& unit)
        : maxima(memory), sums(memory + unit.tiles() * kTileRows), o(memory + 2 * unit.tiles() * kTileRows) {}
};

struct Buffers {
    Scratch rotated, q, scores, piece, block, total, partial;
    std::vector<Unit> units;
};

Buffers& buffers() {
    thread_local Buffers mine;
    return mine;
}

class Attention {
   public:
    Attention(const float* q, std::size_t query_heads, const KvStores& stores, const Sequences& sequences, float scale, float* out)
        : q_(q), query_heads_(query_heads), stores_(stores), sequences_(sequences), scale_(scale), out_(out),
          dim_(stores.head_dim()), kernels_(attention_kernels()) {}

    void run() {
        std::vector<Unit>& units = buffers().units;
        find_units(units);
        std::size_t total = 0, partial_size = 0, divided_tasks = 0;
        for (const Unit& unit : units) total += unit.cost();
        const std::size_t limit = total / (kUnitsPerThread * static_cast<std::size_t>(num_threads()));
        // The dearest first: the threads then end together. The divided ones come last, block by block.
        for (Unit& unit : units) unit.divided = unit.cost() > limit && unit.blocks() > 1;
        std::sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
            return a.divided != b.divided ? b.divided : a.cost() > b.cost();
        });
        std::size_t whole = 0;
        for (Unit& unit : units) {
            if (!unit.divided) {
                ++whole;
                continue;
            }
            unit.partial = partial_size;
            partial_size += unit.blocks() * Part::size(unit, dim_);
            divided_tasks += unit.blocks();
        }
        float* partial = buffers().partial.floats(partial_size);
        parallel_for(whole + divided_tasks, [&](std::size_t task) {
            if (task < whole) return run_unit(units[task]);
            std::size_t block = task - whole, u = whole;
            for (; block >= units[u].blocks(); ++u) block -= units[u].blocks();
            const Unit& unit = units[u];
            run_block(unit, block, gather_queries(unit), Part(partial + unit.partial + block * Part::size(unit, dim_), unit));
        });
        parallel_for(units.size() - whole, [&](std::size_t index) {
            const Unit& unit = units[whole + index];
            Part sum = empty(unit);
            for (std::size_t block = 0; block < unit.blocks(); ++block) {
                join(unit, block, Part(partial + unit.partial + block * Part::size(unit, dim_), unit), sum);
            }
            finish(unit, sum);
        });
    }

   private:
    void find_units(std::vector<Unit>& units) const {
        const std::size_t heads = stores_.heads(), per_group = query_heads_ / heads, per_unit = std::max<std::size_t>(1, kRows / per_group);
        units.clear();
        std::size_t token = 0;
        for (std::size_t sequence = 0; sequence < sequences_.count; ++sequence) {
            const auto fresh = static_cast<std::size_t>(sequences_.fresh[sequence]);
            const auto before = static_cast<std::size_t>(sequences_.lengths[sequence]) - fresh;
            for (std::size_t first = 0; first < fresh; first += per_unit) {
                const std::size_t queries = std::min(per_unit, fresh - first);
                for (std::size_t head = 0; head < heads; ++head) {
                    units.push_back({sequence, head, token + first, queries, before + first + 1, queries * per_group, per_group, 0, false});
                }
            }
            token += fresh;
        }
    }

    // The unit's queries (rows, D), multiplied by the scale.
    const float* gather_queries(const Unit& unit) const {
        float* rows = buffers().q.floats(unit.rows * dim_);
        const std::size_t width = unit.heads_per_group * dim_;
        for (std::size_t query = 0; query < unit.queries; ++query) {
            const float* from = q_ + (unit.first_token + query) * query_heads_ * dim_ + unit.head * width;
            float* to = rows + query * width;
            for (std::size_t i = 0; i < width; ++i) to[i] = from[i] * scale_;
        }
        return rows;
    }

    // `count` keys or values from position `at` on, as float32 (count, D): in place where they lie so, else in the piece's memory.
    const float* widen(const Unit& unit, KvHalf KvStore::* which, std::size_t at, std::size_t count) const {
        const KvStore& store = stores_.of(unit.sequence);
        const KvHalf& half = store.*which;
        const std::int32_t* pages = sequences_.pages + unit.sequence * sequences_.pages_per_sequence;
        float* piece = buffers().piece.floats(kPiece * dim_);
        for (std::size_t done = 0; done < count;) {
            const std::size_t slot = (at + done) % store.slots, now = std::min(count - done, store.slots - slot);
            const std::ptrdiff_t page = pages[(at + done) / store.slots], head = static_cast<std::ptrdiff_t>(unit.head);
            const std::ptrdiff_t from =
                page * half.page_stride + head * half.head_stride + static_cast<std::ptrdiff_t>(slot * dim_);
            float* to = piece + done * dim_;
            switch (store.type) {
                case KvType::kFloat32: {
                    const float* values = static_cast<const float*>(half.base) + from;
                    if (now == count) return values;
                    std::memcpy(to, values, now * dim_ * sizeof(float));
                    break;
                }
                case KvType::kBfloat16:
                    kernels_.widen_bfloat16(static_cast<const std::uint16_t*>(half.base) + from, now * dim_, to);
                    break;
                case KvType::kInt8: {
                    const float* scales = half.scales + page * half.scale_page_stride + head * half.scale_head_stride + slot;
                    for (std::size_t i = 0; i < now; ++i) {
                        kernels_.widen_int8(static_cast<const std::int8_t*>(half.base) + from + i * dim_, scales[i], dim_, to + i * dim_);
                    }
                    break;
                }
            }
            done += now;
        }
        return piece;
    }

    // Calls body(tile, keys from the piece's start that the tile sees).
    template <typename Body>
    void for_pieces(const Unit& unit, KvHalf KvStore::* which, std::size_t start, const Body& body) const {
        const std::size_t count = std::min(kBlock, unit.keys() - start), tiles = unit.tiles();
        for (std::size_t piece = 0; piece < count; piece += kPiece) {
            const float* values = widen(unit, which, start + piece, std::min(kPiece, count - piece));
            for (std::size_t tile = 0; tile < tiles; ++tile) {
                const std::size_t keys = unit.tile_keys(tile, start);
                if (keys > piece) body(tile, piece, values, std::min(kPiece, keys - piece));
            }
        }
    }

    void run_block(const Unit& unit, std::size_t block, const float* queries, Part part) const {
        const std::size_t start = block * kBlock, tiles = unit.tiles();
        float* scores = buffers().scores.floats(tiles * kBlock * kTileRows);
        for_pieces(unit, &KvStore::keys, start, [&](std::size_t tile, std::size_t piece, const float* keys, std::size_t count) {
            kernels_.dots(queries + tile * kTileRows * dim_, unit.tile_rows(tile), keys, count, dim_,
                          scores + (tile * kBlock + piece) * kTileRows);
        });
        for (std::size_t tile = 0; tile < tiles; ++tile) {
            const std::size_t keys = unit.tile_keys(tile, start);
            float *tile_scores = scores + tile * kBlock * kTileRows, *maxima = part.maxima + tile * kTileRows;
            if (keys == 0) {
                std::fill(maxima, maxima + kTileRows, kNone);
                continue;
            }
            for (std::size_t row = 0; row < unit.tile_rows(tile); ++row) {
                for (std::size_t key = unit.row_keys(tile * kTileRows + row, start); key < keys; ++key) {
                    tile_scores[key * kTileRows + row] = kNone;
                }
            }
            kernels_.softmax(tile_scores, keys, maxima, part.sums + tile * kTileRows);
        }
        std::memset(part.o, 0, unit.rows * dim_ * sizeof(float));
        for_pieces(unit, &KvStore::values, start, [&](std::size_t tile, std::size_t piece, const float* values, std::size_t count) {
            kernels_.weigh(scores + (tile * kBlock + piece) * kTileRows, unit.tile_rows(tile), values, count, dim_,
                           part.o + tile * kTileRows * dim_);
        });
    }

    void run_unit(const Unit& unit) const {
        const float* queries = gather_queries(unit);
        const Part part(buffers().block.floats(Part::size(unit, dim_)), unit);
        Part sum = empty(unit);
        for (std::size_t block = 0; block < unit.blocks(); ++block) {
            run_block(unit, block, queries, part);
            join(unit, block, part, sum);
        }
        finish(unit, sum);
    }

    Part empty(const Unit& unit) const {
        const std::size_t size = Part::size(unit, dim_);
        Part sum(buffers().total.floats(size), unit);
        std::fill(sum.maxima, sum.sums, kNone);
        std::fill(sum.sums, sum.maxima + size, 0.0f);
        return sum;
    }

    void join(const Unit& unit, std::size_t block, const Part& part, const Part& sum) const {
        for (std::size_t tile = 0; tile < unit.tiles(); ++tile) {
            if (unit.tile_keys(tile, block * kBlock) == 0) continue;
            const std::size_t row = tile * kTileRows, values = row * dim_;
            kernels_.join(part.maxima + row, part.sums + row, part.o + values, unit.tile_rows(tile), dim_, sum.maxima + row,
                          sum.sums + row, sum.o + values);
        }
    }

    void finish(const Unit& unit, const Part& sum) const {
        for (std::size_t row = 0; row < unit.rows; ++row) {
            const std::size_t token = unit.first_token + row / unit.heads_per_group;
            const std::size_t head = unit.head * unit.heads_per_group + row % unit.heads_per_group;
            kernels_.finish(sum.o + row * dim_, sum.sums[row], dim_, out_ + (token * query_heads_ + head) * dim_);
        }
    }

    const float* q_;
    std::size_t query_heads_;
    const KvStores& stores_;
    const Sequences& sequences_;
    float scale_;
    float* out_;
    std::size_t dim_;
    const AttentionKernels& kernels_;
};

}  // namespace

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
        case Isa::kAmx:
        case Isa::kAvx512: return avx512_attention();
        case Isa::kAvx2: return avx2_attention();
        default: break;
    }
#endif
    return baseline_attention();
}

void attention(const float* q, std::size_t query_heads, const KvStores& stores, const Sequences& sequences, float scale, float* out) {
    Attention(q, query_heads, stores, sequences, scale, out).run();
}

void attend(const float* qkv, std::size_t query_heads, const float* rotation, const KvStores& stores, const Sequences& sequences,
            float scale, float* out) {
    std::size_t tokens = 0;
    for (std::size_t i = 0; i < sequences.count; ++i) tokens += static_cast<std::size_t>(sequences.fresh[i]);
    float* q = buffers().rotated.floats(tokens * query_heads * stores.head_dim());
    rope_append(qkv, query_heads, rotation, stores, sequences, q);
    attention(q, query_heads, stores, sequences, scale, out);
}

}  // namespace ernie45
