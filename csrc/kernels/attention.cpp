// Division of the work and the walk over blocks and pages; everything hot is behind attention_kernels(). See attention.hpp for the
// arithmetic.
#include "kernels/attention.hpp"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/aligned.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/isa.hpp"
#include "kernels/thread_pool.hpp"

namespace ernie45 {
namespace {

constexpr std::size_t kRows = 128;  // rows of a unit, so that a packed piece serves many
// int8 values are widened beforehand for more tiles than this: doing it again for each costs a third of the multiply-adds, against
// an eighth for bfloat16.
constexpr std::size_t kTilesInPlace = 2;
// A unit that costs more than this share of a thread's work is divided by blocks.
constexpr std::size_t kUnitsPerThread = 4;
// The blocks of divided units go in runs, of which each thread gets about this many: a run begins with keys that nobody asked for.
constexpr std::size_t kRunsPerThread = 8;

constexpr float kNone = -std::numeric_limits<float>::infinity();

std::size_t divide_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit; }
// Keys are packed and scored 16 at a time; the ones too many are read but not used.
std::size_t up(std::size_t keys) { return divide_up(keys, 16) * 16; }

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

// Where the keys, or values, of a block lie, and those that are needed next.
struct Places {
    const void* at[kBlock + kPiece];
    float scales[kBlock + kPiece];
};

struct Buffers {
    Scratch rotated, q, scores, piece, block, total, partial;
    Places keys, values;
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
        const auto threads = static_cast<std::size_t>(num_threads());
        std::size_t total = 0, partial_size = 0, runs = 0;
        for (const Unit& unit : units) total += unit.cost();
        const std::size_t limit = total / (kUnitsPerThread * threads);
        // The dearest first: the threads then end together. The divided ones come last, block by block.
        for (Unit& unit : units) unit.divided = unit.cost() > limit && unit.blocks() > 1;
        std::sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
            return a.divided != b.divided ? b.divided : a.cost() > b.cost();
        });
        std::size_t whole = 0, divided_blocks = 0;
        for (Unit& unit : units) {
            if (!unit.divided) {
                ++whole;
                continue;
            }
            unit.partial = partial_size;
            partial_size += unit.blocks() * Part::size(unit, dim_);
            divided_blocks += unit.blocks();
        }
        const std::size_t run = std::max<std::size_t>(1, divided_blocks / (kRunsPerThread * threads));
        for (std::size_t u = whole; u < units.size(); ++u) runs += divide_up(units[u].blocks(), run);
        float* partial = buffers().partial.floats(partial_size);
        parallel_for(whole + runs, [&](std::size_t task) {
            if (task < whole) return run_unit(units[task]);
            std::size_t block = (task - whole) * run, u = whole;
            for (; block >= units[u].blocks(); ++u) block -= divide_up(units[u].blocks(), run) * run;
            const Unit& unit = units[u];
            const float* queries = gather_queries(unit);
            for (const std::size_t end = std::min(block + run, unit.blocks()); block < end; ++block) {
                const Part part(partial + unit.partial + block * Part::size(unit, dim_), unit);
                run_block(unit, block, queries, part, block + 1 < end);
            }
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

    // The unit's queries (rows, kMaxHeadDim), multiplied by the scale.
    const float* gather_queries(const Unit& unit) const {
        float* rows = buffers().q.floats(unit.rows * kMaxHeadDim);
        for (std::size_t row = 0; row < unit.rows; ++row) {
            const std::size_t token = unit.first_token + row / unit.heads_per_group;
            const std::size_t head = unit.head * unit.heads_per_group + row % unit.heads_per_group;
            const float* from = q_ + (token * query_heads_ + head) * dim_;
            float* to = rows + row * kMaxHeadDim;
            for (std::size_t i = 0; i < dim_; ++i) to[i] = from[i] * scale_;
        }
        return rows;
    }

    // Enters `count` keys or values from position `start` on.
    void find_places(const Unit& unit, KvHalf KvStore::* which, std::size_t start, std::size_t count, const void** at,
                     float* scales) const {
        const KvStore& store = stores_.of(unit.sequence);
        const KvHalf& half = store.*which;
        const std::int32_t* pages = sequences_.pages + unit.sequence * sequences_.pages_per_sequence;
        const std::size_t element = store.type == KvType::kFloat32 ? 4 : store.type == KvType::kBfloat16 ? 2 : 1;
        std::size_t slot = start % store.slots;
        for (std::size_t page_idx = start / store.slots, done = 0; done < count; ++page_idx, slot = 0) {
            const std::size_t now = std::min(count - done, store.slots - slot);
            const std::ptrdiff_t page = pages[page_idx], head = static_cast<std::ptrdiff_t>(unit.head);
            const std::ptrdiff_t first =
                page * half.page_stride + head * half.head_stride + static_cast<std::ptrdiff_t>(slot * dim_);
            const char* from = static_cast<const char*>(half.base) + first * static_cast<std::ptrdiff_t>(element);
            for (std::size_t i = 0; i < now; ++i) at[done + i] = from + i * dim_ * element;
            if (store.type == KvType::kInt8) {
                const float* row = half.scales + page * half.scale_page_stride + head * half.scale_head_stride + slot;
                std::copy(row, row + now, scales + done);
            }
            done += now;
        }
    }

    // Keys and values of a block; what follows the keys are the values, what follows those the keys of the next block, if this
    // thread goes on with it.
    std::pair<KvRows, KvRows> find_block(const Unit& unit, std::size_t start, std::size_t count, bool goes_on) const {
        Places &keys = buffers().keys, &values = buffers().values;
        find_places(unit, &KvStore::keys, start, count, keys.at, keys.scales);
        find_places(unit, &KvStore::values, start, count, values.at, values.scales);
        const std::size_t end = start + count, next = goes_on ? std::min(kPiece, unit.keys() - end) : 0;
        find_places(unit, &KvStore::keys, end, next, values.at + count, values.scales + count);
        std::fill(values.at + count + next, values.at + count + kPiece, values.at[count + next - 1]);
        std::copy(values.at, values.at + kPiece, keys.at + count);
        const KvType type = stores_.of(unit.sequence).type;
        return {{type, keys.at, keys.scales, true}, {type, values.at, values.scales, true}};
    }

    // float32 copies of `count` int8 rows.
    KvRows widen(const KvRows& rows, std::size_t count, Places& places) const {
        float* to = buffers().piece.floats(kPiece * dim_);
        for (std::size_t i = 0; i < count; ++i, to += dim_) {
            places.at[i] = to;
            kernels_.widen_int8(static_cast<const std::int8_t*>(rows.at[i]), rows.scales[i], dim_, to);
        }
        return {KvType::kFloat32, places.at, places.scales, false};
    }

    // Calls body(tile, keys of the piece that the tile sees).
    template <typename Body>
    void for_tiles(const Unit& unit, std::size_t start, std::size_t piece, const Body& body) const {
        for (std::size_t tile = 0; tile < unit.tiles(); ++tile) {
            const std::size_t keys = unit.tile_keys(tile, start);
            if (keys > piece) body(tile, std::min(kPiece, keys - piece));
        }
    }

    void run_block(const Unit& unit, std::size_t block, const float* queries, Part part, bool goes_on) const {
        const std::size_t start = block * kBlock, tiles = unit.tiles(), count = std::min(kBlock, unit.keys() - start);
        const auto [keys, values] = find_block(unit, start, count, goes_on);
        float *scores = buffers().scores.floats(tiles * kTileRows * kBlock), *packed = buffers().piece.floats(kPiece * dim_);
        for (std::size_t piece = 0; piece < count; piece += kPiece) {
            KvRows here = keys.from(piece);
            kernels_.pack(here, up(std::min(kPiece, count - piece)), dim_, packed);
            for_tiles(unit, start, piece, [&](std::size_t tile, std::size_t seen) {
                const std::size_t row = tile * kTileRows;
                kernels_.score(queries + row * kMaxHeadDim, unit.tile_rows(tile), packed, here, up(seen), dim_,
                               scores + row * kBlock + piece);
                here.ahead = false;  // asked for
            });
        }
        for (std::size_t row = 0; row < unit.rows; ++row) {
            kernels_.softmax(scores + row * kBlock, unit.row_keys(row, start), unit.tile_keys(row / kTileRows, start),
                             part.maxima + row, part.sums + row);
        }
        const bool in_place = tiles <= kTilesInPlace || values.type != KvType::kInt8;
        for (std::size_t piece = 0; piece < count; piece += kPiece) {
            KvRows here = values.from(piece);
            if (!in_place) here = widen(here, std::min(kPiece, count - piece), buffers().keys);
            for_tiles(unit, start, piece, [&](std::size_t tile, std::size_t seen) {
                const std::size_t row = tile * kTileRows;
                const bool end = piece + kPiece >= unit.tile_keys(tile, start);
                kernels_.weigh(scores + row * kBlock + piece, unit.tile_rows(tile), here, seen, dim_, piece == 0, end,
                               part.o + row * dim_);
                here.ahead = false;
            });
        }
    }

    void run_unit(const Unit& unit) const {
        const float* queries = gather_queries(unit);
        const Part part(buffers().block.floats(Part::size(unit, dim_)), unit);
        Part sum = empty(unit);
        for (std::size_t block = 0; block < unit.blocks(); ++block) {
            run_block(unit, block, queries, part, true);
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
