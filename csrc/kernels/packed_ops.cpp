// Drivers around the block kernels: rounding of activations, division into tasks, sums. Compiled without special flags; everything
// hot is behind block_kernels().
#include "kernels/packed_ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/half.hpp"
#include "kernels/isa.hpp"
#include "kernels/thread_pool.hpp"

namespace ernie45 {
namespace {

// Activations of this many bytes stay in a core's cache while many row blocks pass over them.
constexpr std::size_t kCachedBytes = 96 * 1024;
// A task's weights: each change of task interrupts a thread's stream from memory, so few and large ones are best (256 KB reads 26.6
// GB/s where 32 KB reads 20.8); but every thread should get several, so that all finish together.
constexpr std::size_t kTaskBytes = 256 * 1024, kTasksPerThread = 4;
constexpr std::size_t kBlocksOf64 = kGroup / kRows;

// Rows of rounded activations in memory that belongs to a RoundedBuffer, in tiles: see Rounded.
struct RoundedRows {
    std::uint8_t* values = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
    std::size_t groups = 0, height = 1;
    bool wide = false;

    std::size_t group_bytes() const { return wide ? 2 * kGroup : kGroup; }

    Rounded from(std::size_t row) const {
        const std::size_t before = row / kRowsOfTile * groups * height;
        return {values + before * group_bytes(), scales + before, sums + 2 * before, height, row % kRowsOfTile};
    }

    void round_group(const float* x, std::size_t row, std::size_t group, const BlockKernels& kernels) const {
        const std::size_t before = (row / kRowsOfTile * groups + group) * height;
        kernels.round[wide](x, row % kRowsOfTile, height, values + before * group_bytes(), scales + before, sums + 2 * before);
    }

    void round_row(const float* x, std::size_t columns, std::size_t row, const BlockKernels& kernels) const {
        for (std::size_t g = 0; g < groups; ++g) {
            const float* group = x + g * kGroup;
            float padded[kGroup];
            if ((g + 1) * kGroup > columns) {
                std::memset(padded, 0, sizeof padded);
                std::memcpy(padded, group, (columns - g * kGroup) * sizeof(float));
                group = padded;
            }
            round_group(group, row, g, kernels);
        }
    }
};

// Memory for rounded rows. Kept per calling thread, so that a step allocates nothing.
class RoundedBuffer {
   public:
    // Ends the life of all rows taken before, and begins counting what will be taken.
    void clear() { wanted_ = taken_ = 0; }
    void want(std::size_t rows, std::size_t groups) { wanted_ += padded(rows) * groups; }

    void reserve() {
        if (scales_.size() < wanted_) {
            values_.resize(wanted_ * 2 * kGroup + kSlack);
            scales_.resize(wanted_);
            sums_.resize(2 * wanted_);
        }
    }

    RoundedRows take(std::size_t rows, std::size_t groups, bool wide) {
        const std::size_t at = taken_;
        taken_ += padded(rows) * groups;
        return {values_.data() + at * 2 * kGroup, scales_.data() + at, sums_.data() + 2 * at, groups, std::min(rows, kRowsOfTile), wide};
    }

   private:
    static std::size_t padded(std::size_t rows) { return rows < kRowsOfTile ? rows : round_up(rows, kRowsOfTile); }

    std::vector<std::uint8_t> values_;
    std::vector<float> scales_;
    std::vector<std::int32_t> sums_;
    std::size_t wanted_ = 0, taken_ = 0;
};

// A unit of the feed-forward with its rounded inputs and the place for what is between its two products.
struct PreparedUnit {
    const FfnUnit* unit;
    RoundedRows x, inner;
    std::size_t first_task;  // of its gate and up tasks

    std::size_t token(std::size_t i) const { return unit->tokens == nullptr ? i : static_cast<std::size_t>(unit->tokens[i]); }
    float weight(std::size_t i) const { return unit->weights == nullptr ? 1.0f : unit->weights[i]; }
};

struct Scratch {
    RoundedBuffer x, gathered, inner;
    std::vector<PreparedUnit> units;
};

Scratch& scratch() {
    thread_local Scratch buffers;
    return buffers;
}

void round_rows(const float* x, std::size_t rows, std::size_t columns, const RoundedRows& out, const BlockKernels& kernels) {
    const auto one = [&](std::size_t row) { out.round_row(x + row * columns, columns, row, kernels); };
    // A few rows are rounded in less time than a second thread needs to wake.
    if (rows * columns < 32 * 1024) {
        for (std::size_t row = 0; row < rows; ++row) one(row);
    } else {
        parallel_for(rows, one);
    }
}

// The input of one matrix, in the calling thread's memory.
RoundedRows rounded_input(const float* x, std::size_t tokens, const Packed& m, const BlockKernels& kernels) {
    RoundedBuffer& buffer = scratch().x;
    buffer.clear();
    buffer.want(tokens, m.groups());
    buffer.reserve();
    const RoundedRows rows = buffer.take(tokens, m.groups(), m.wide);
    round_rows(x, tokens, m.columns, rows, kernels);
    return rows;
}

void run_block(const BlockKernels& kernels, const Packed& m, std::size_t block, const Rounded& x, std::size_t tokens, float* out) {
    kernels.block(m)(m.block_weights(block), m.block_scales(block), m.groups(), m.groups_per_scale, x, tokens, out);
}

// How many of `blocks` row blocks, of so many bytes each, make a task.
std::size_t blocks_per_task(std::size_t blocks, std::size_t block_bytes) {
    const std::size_t fair = blocks / (kTasksPerThread * static_cast<std::size_t>(num_threads()));
    return std::max<std::size_t>(1, std::min(kTaskBytes / std::max<std::size_t>(1, block_bytes), fair));
}

// Tokens whose rounded rows stay in cache, in whole tiles.
std::size_t tokens_per_pass(const RoundedRows& x, std::size_t tile) {
    return std::max(tile, kCachedBytes / (x.groups * x.group_bytes()) / tile * tile);
}

}  // namespace

void packed_linear(const float* x, std::size_t tokens, const Packed& m, const float* bias, const float* residual, float* y) {
    if (tokens == 0) return;
    const BlockKernels& kernels = block_kernels();
    const RoundedRows rounded = rounded_input(x, tokens, m, kernels);
    const std::size_t per_task = blocks_per_task(m.blocks(), m.groups() * m.group_bytes()), per_pass = tokens_per_pass(rounded, kernels.max_tile);
    parallel_for(round_up(m.blocks(), per_task) / per_task, [&](std::size_t task) {
        const std::size_t first = task * per_task, last = std::min(first + per_task, m.blocks());
        float tile[kMaxTile * kRows];
        for (std::size_t pass = 0; pass < tokens; pass += per_pass) {
            for (std::size_t block = first; block < last; ++block) {
                const std::size_t row = block * kRows, width = std::min(kRows, m.rows - row);
                for (std::size_t t = pass; t < std::min(pass + per_pass, tokens); t += kernels.max_tile) {
                    const std::size_t now = std::min({kernels.max_tile, tokens - t, pass + per_pass - t});
                    run_block(kernels, m, block, rounded.from(t), now, tile);
                    for (std::size_t i = 0; i < now; ++i) {
                        float* out = y + (t + i) * m.rows + row;
                        const float* more = residual == nullptr ? nullptr : residual + (t + i) * m.rows + row;
                        for (std::size_t r = 0; r < width; ++r) {
                            float value = tile[i * kRows + r];
                            if (bias != nullptr) value += bias[row + r];
                            out[r] = more == nullptr ? value : value + more[r];
                        }
                    }
                }
            }
        }
    });
}

namespace {

struct Found {
    float value;
    std::int64_t id;

    bool before(const Found& other) const { return value > other.value || (value == other.value && id < other.id); }
};

// Puts a candidate into a list in order, of `count` places; `size` is how many are taken.
void insert(Found* list, std::size_t count, std::size_t& size, const Found& candidate) {
    if (size == count && !candidate.before(list[size - 1])) return;
    std::size_t place = size < count ? size++ : size - 1;
    for (; place > 0 && candidate.before(list[place - 1]); --place) list[place] = list[place - 1];
    list[place] = candidate;
}

}  // namespace

void packed_top(const float* x, std::size_t tokens, const Packed& m, const float* bias, std::size_t count, float* values,
                std::int64_t* ids) {
    if (tokens == 0) return;
    const BlockKernels& kernels = block_kernels();
    const RoundedRows rounded = rounded_input(x, tokens, m, kernels);
    const std::size_t per_task = blocks_per_task(m.blocks(), m.groups() * m.group_bytes());
    const std::size_t tasks = round_up(m.blocks(), per_task) / per_task;
    std::vector<Found> lists(tasks * tokens * count);
    std::vector<std::size_t> sizes(tasks * tokens);
    parallel_for(tasks, [&](std::size_t task) {
        float tile[kMaxTile * kRows];
        for (std::size_t block = task * per_task; block < std::min((task + 1) * per_task, m.blocks()); ++block) {
            const std::size_t row = block * kRows, width = std::min(kRows, m.rows - row);
            for (std::size_t t = 0; t < tokens; t += kernels.max_tile) {
                const std::size_t now = std::min(kernels.max_tile, tokens - t);
                run_block(kernels, m, block, rounded.from(t), now, tile);
                for (std::size_t i = 0; i < now; ++i) {
                    const std::size_t list = task * tokens + t + i;
                    for (std::size_t r = 0; r < width; ++r) {
                        float value = tile[i * kRows + r];
                        if (bias != nullptr) value += bias[row + r];
                        if (std::isnan(value)) value = -std::numeric_limits<float>::infinity();
                        insert(&lists[list * count], count, sizes[list], {value, static_cast<std::int64_t>(row + r)});
                    }
                }
            }
        }
    });
    std::vector<Found> best(count);
    for (std::size_t t = 0; t < tokens; ++t) {
        std::size_t size = 0;
        for (std::size_t task = 0; task < tasks; ++task) {
            const std::size_t list = task * tokens + t;
            for (std::size_t i = 0; i < sizes[list]; ++i) insert(best.data(), count, size, lists[list * count + i]);
        }
        for (std::size_t i = 0; i < count; ++i) {
            values[t * count + i] = best[i].value;
            ids[t * count + i] = best[i].id;
        }
    }
}

void packed_ffn(const float* x, std::size_t tokens, std::size_t hidden, const FfnUnit* units, std::size_t num_units,
                const float* residual, float* y) {
    if (tokens == 0) return;
    const BlockKernels& kernels = block_kernels();
    Scratch& buffers = scratch();
    const std::size_t groups = round_up(hidden, kGroup) / kGroup;

    // The inputs, rounded in each width that some unit wants.
    RoundedRows rounded[2];
    for (RoundedBuffer* buffer : {&buffers.x, &buffers.gathered, &buffers.inner}) buffer->clear();
    for (std::size_t width = 0; width < 2; ++width) buffers.x.want(tokens, groups);
    buffers.x.reserve();
    for (std::size_t u = 0; u < num_units; ++u) {
        const FfnUnit& unit = units[u];
        buffers.gathered.want(unit.count, groups);
        buffers.inner.want(unit.count, unit.down.groups());
        RoundedRows& rows = rounded[unit.gate_up.wide];
        if (unit.count == tokens && rows.values == nullptr) {
            rows = buffers.x.take(tokens, groups, unit.gate_up.wide);
            round_rows(x, tokens, hidden, rows, kernels);
        }
    }
    buffers.gathered.reserve();
    buffers.inner.reserve();
    std::vector<PreparedUnit>& prepared = buffers.units;
    prepared.clear();
    std::size_t gate_tasks = 0;
    for (std::size_t u = 0; u < num_units; ++u) {
        const FfnUnit& unit = units[u];
        if (unit.count == 0) continue;
        PreparedUnit next{&unit, rounded[unit.gate_up.wide], buffers.inner.take(unit.count, unit.down.groups(), unit.down.wide),
                          gate_tasks};
        if (unit.count < tokens) next.x = buffers.gathered.take(unit.count, groups, unit.gate_up.wide);
        gate_tasks += unit.down.groups();
        prepared.push_back(next);
    }
    // Rows of chosen tokens are brought together; a unit that sees all of them, in ascending order, takes them where they are.
    parallel_for(prepared.size(), [&](std::size_t u) {
        const PreparedUnit& unit = prepared[u];
        for (std::size_t i = 0; i < unit.unit->count && unit.unit->count < tokens; ++i) {
            unit.x.round_row(x + unit.token(i) * hidden, hidden, i, kernels);
        }
    });

    // Gate and up, 64 inner values per task: they are one group of the next product and are rounded on the spot.
    parallel_for(gate_tasks, [&](std::size_t task) {
        std::size_t u = 0;
        while (u + 1 < prepared.size() && task >= prepared[u + 1].first_task) ++u;
        const PreparedUnit& unit = prepared[u];
        const std::size_t group = task - unit.first_task;
        const Packed& m = unit.unit->gate_up;
        float gate[kMaxTile * kRows], up[kMaxTile * kRows], product[kMaxTile][kGroup];
        for (std::size_t t = 0; t < unit.unit->count; t += kernels.max_tile) {
            const std::size_t now = std::min(kernels.max_tile, unit.unit->count - t);
            const Rounded in = unit.x.from(t);
            for (std::size_t b = 0; b < kBlocksOf64; ++b) {
                const std::size_t block = 2 * (group * kBlocksOf64 + b);
                run_block(kernels, m, block, in, now, gate);
                run_block(kernels, m, block + 1, in, now, up);
                for (std::size_t i = 0; i < now; ++i) kernels.swiglu(gate + i * kRows, up + i * kRows, product[i] + b * kRows);
            }
            for (std::size_t i = 0; i < now; ++i) unit.inner.round_group(product[i], t + i, group, kernels);
        }
    });

    // Down, some row blocks per task over all units: the task owns those outputs, so sums need no lock and no second pass.
    const std::size_t blocks = round_up(hidden, kRows) / kRows;
    std::size_t largest = 0;
    for (const PreparedUnit& unit : prepared) largest = std::max(largest, unit.unit->down.groups() * unit.unit->down.group_bytes());
    const std::size_t per_task = blocks_per_task(blocks, largest);
    parallel_for(round_up(blocks, per_task) / per_task, [&](std::size_t task) {
        const std::size_t first = task * per_task, last = std::min(first + per_task, blocks);
        const std::size_t start = first * kRows, width = std::min(last * kRows, hidden) - start;
        for (std::size_t t = 0; t < tokens; ++t) {
            float* out = y + t * hidden + start;
            if (residual == nullptr) {
                std::memset(out, 0, width * sizeof(float));
            } else if (y != residual) {
                std::memcpy(out, residual + t * hidden + start, width * sizeof(float));
            }
        }
        float tile[kMaxTile * kRows];
        for (const PreparedUnit& unit : prepared) {
            for (std::size_t block = first; block < last; ++block) {
                const std::size_t row = block * kRows, here = std::min(kRows, hidden - row);
                for (std::size_t t = 0; t < unit.unit->count; t += kernels.max_tile) {
                    const std::size_t now = std::min(kernels.max_tile, unit.unit->count - t);
                    run_block(kernels, unit.unit->down, block, unit.inner.from(t), now, tile);
                    for (std::size_t i = 0; i < now; ++i) {
                        const float weight = unit.weight(t + i);
                        float* out = y + unit.token(t + i) * hidden + row;
                        for (std::size_t r = 0; r < here; ++r) out[r] += weight * tile[i * kRows + r];
                    }
                }
            }
        }
    });
}

void packed_row(const Packed& m, std::size_t row, float* y) {
    // The product with a unit vector would round; instead each weight is read from its byte.
    const std::uint8_t* weights = m.block_weights(row / kRows);
    const std::uint16_t* scales = m.block_scales(row / kRows);
    const std::size_t r = row % kRows;
    for (std::size_t column = 0; column < m.columns; ++column) {
        const std::size_t g = column / kGroup, c = column % kGroup;
        const std::uint8_t* group = weights + g * m.group_bytes();
        int code;
        if (m.bits == 8) {
            code = group[c / 4 * 64 + 4 * r + c % 4];
        } else {
            const std::uint8_t byte = group[c / 8 * 64 + 4 * r + c % 4];
            code = c % 8 < 4 ? byte & 15 : byte >> 4;
        }
        if (m.minima) {
            const std::uint16_t* set = scales + column / kHalf * 2 * kRows + r;
            y[column] = static_cast<float>(code) * half_to_float(set[0]) + half_to_float(set[kRows]);
        } else {
            const int value = code - (m.bits == 8 ? kOffset8 : kOffset4);
            y[column] = static_cast<float>(value) * half_to_float(scales[g / m.groups_per_scale * kRows + r]);
        }
    }
}

}  // namespace ernie45
