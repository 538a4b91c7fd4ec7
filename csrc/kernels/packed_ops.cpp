// Drivers around the block kernels: rounding of activations, division into tasks, sums. Compiled without special flags; everything
// hot is behind block_kernels().
#include "kernels/packed_ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/half.hpp"
#include "kernels/isa.hpp"
#include "kernels/thread_pool.hpp"

namespace ernie45 {
namespace {

// Activations of this many bytes stay in a core's cache while many row blocks pass over them.
constexpr std::size_t kCachedBytes = 96 * 1024;
// A task's weights: large enough that drawing tasks costs nothing, small enough that all threads finish together.
constexpr std::size_t kTaskBytes = 32 * 1024;
constexpr std::size_t kBlocksOf64 = kGroup / kRows;

// Rows of rounded activations in memory that belongs to a RoundedBuffer.
struct RoundedRows {
    std::uint8_t* values = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
    std::size_t groups = 0;
    bool wide = false;

    std::size_t group_bytes() const { return wide ? 2 * kGroup : kGroup; }

    Rounded from(std::size_t row) const {
        const std::size_t at = row * groups;
        return {values + at * group_bytes(), scales + at, sums + 2 * at};
    }

    void round_group(const float* x, std::size_t row, std::size_t group, const BlockKernels& kernels) const {
        const std::size_t at = row * groups + group;
        kernels.round[wide](x, values + at * group_bytes(), scales + at, sums + 2 * at);
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

    void copy_row(const Rounded& row, std::size_t to) const {
        std::memcpy(values + to * groups * group_bytes(), row.values, groups * group_bytes());
        std::memcpy(scales + to * groups, row.scales, groups * sizeof(float));
        std::memcpy(sums + 2 * to * groups, row.sums, 2 * groups * sizeof(std::int32_t));
    }
};

// Memory for rounded rows. Kept per calling thread, so that a step allocates nothing.
class RoundedBuffer {
   public:
    // Room for that many groups, whatever their width; ends the life of all rows taken before.
    void reserve(std::size_t num_groups) {
        if (scales_.size() < num_groups) {
            values_.resize(num_groups * 2 * kGroup);
            scales_.resize(num_groups);
            sums_.resize(2 * num_groups);
        }
        taken_ = 0;
    }

    RoundedRows take(std::size_t rows, std::size_t groups, bool wide) {
        const std::size_t at = taken_;
        taken_ += rows * groups;
        return {values_.data() + at * 2 * kGroup, scales_.data() + at, sums_.data() + 2 * at, groups, wide};
    }

   private:
    std::vector<std::uint8_t> values_;
    std::vector<float> scales_;
    std::vector<std::int32_t> sums_;
    std::size_t taken_ = 0;
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

void run_block(const BlockKernels& kernels, const Packed& m, std::size_t block, const Rounded& x, std::size_t tokens, float* out) {
    kernels.block(m)(m.block_weights(block), m.block_scales(block), m.groups(), m.groups_per_scale, x, tokens, out);
}

std::size_t blocks_per_task(const Packed& m) {
    const std::size_t bytes = m.groups() * m.group_bytes();
    return std::max<std::size_t>(1, kTaskBytes / std::max<std::size_t>(1, bytes));
}

// Tokens whose rounded rows stay in cache, in whole tiles.
std::size_t tokens_per_pass(const RoundedRows& x) {
    return std::max(kMaxTile, kCachedBytes / (x.groups * x.group_bytes()) / kMaxTile * kMaxTile);
}

}  // namespace

void packed_linear(const float* x, std::size_t tokens, const Packed& m, const float* bias, const float* residual, float* y) {
    if (tokens == 0) return;
    const BlockKernels& kernels = block_kernels();
    RoundedBuffer& buffer = scratch().x;
    buffer.reserve(tokens * m.groups());
    const RoundedRows rounded = buffer.take(tokens, m.groups(), m.wide);
    round_rows(x, tokens, m.columns, rounded, kernels);
    const std::size_t per_task = blocks_per_task(m), per_pass = tokens_per_pass(rounded);
    parallel_for(round_up(m.blocks(), per_task) / per_task, [&](std::size_t task) {
        const std::size_t first = task * per_task, last = std::min(first + per_task, m.blocks());
        float tile[kMaxTile * kRows];
        for (std::size_t pass = 0; pass < tokens; pass += per_pass) {
            for (std::size_t block = first; block < last; ++block) {
                const std::size_t row = block * kRows, width = std::min(kRows, m.rows - row);
                for (std::size_t t = pass; t < std::min(pass + per_pass, tokens); t += kMaxTile) {
                    const std::size_t now = std::min({kMaxTile, tokens - t, pass + per_pass - t});
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

void packed_ffn(const float* x, std::size_t tokens, std::size_t hidden, const FfnUnit* units, std::size_t num_units,
                const float* residual, float* y) {
    if (tokens == 0) return;
    const BlockKernels& kernels = block_kernels();
    Scratch& buffers = scratch();
    const std::size_t groups = round_up(hidden, kGroup) / kGroup;

    // The inputs, rounded in each width that some unit wants.
    RoundedRows rounded[2];
    buffers.x.reserve(2 * tokens * groups);
    std::size_t gathered_groups = 0, inner_groups = 0;
    for (std::size_t u = 0; u < num_units; ++u) {
        const FfnUnit& unit = units[u];
        gathered_groups += unit.count * groups;
        inner_groups += unit.count * unit.down.groups();
        RoundedRows& rows = rounded[unit.gate_up.wide];
        if (unit.count > 0 && rows.values == nullptr) {
            rows = buffers.x.take(tokens, groups, unit.gate_up.wide);
            round_rows(x, tokens, hidden, rows, kernels);
        }
    }
    buffers.gathered.reserve(gathered_groups);
    buffers.inner.reserve(inner_groups);
    std::vector<PreparedUnit>& prepared = buffers.units;
    prepared.clear();
    std::size_t gate_tasks = 0;
    for (std::size_t u = 0; u < num_units; ++u) {
        const FfnUnit& unit = units[u];
        if (unit.count == 0) continue;
        PreparedUnit next{&unit, rounded[unit.gate_up.wide], buffers.inner.take(unit.count, unit.down.groups(), unit.down.wide),
                          gate_tasks};
        // Rows of chosen tokens are brought together; a unit that sees all of them, in order, takes them where they are.
        if (unit.tokens != nullptr && unit.count < tokens) {
            next.x = buffers.gathered.take(unit.count, groups, unit.gate_up.wide);
            for (std::size_t i = 0; i < unit.count; ++i) {
                next.x.copy_row(rounded[unit.gate_up.wide].from(static_cast<std::size_t>(unit.tokens[i])), i);
            }
        }
        gate_tasks += unit.down.groups();
        prepared.push_back(next);
    }

    // Gate and up, 64 inner values per task: they are one group of the next product and are rounded on the spot.
    parallel_for(gate_tasks, [&](std::size_t task) {
        std::size_t u = 0;
        while (u + 1 < prepared.size() && task >= prepared[u + 1].first_task) ++u;
        const PreparedUnit& unit = prepared[u];
        const std::size_t group = task - unit.first_task;
        const Packed& m = unit.unit->gate_up;
        float gate[kMaxTile * kRows], up[kMaxTile * kRows], product[kMaxTile][kGroup];
        for (std::size_t t = 0; t < unit.unit->count; t += kMaxTile) {
            const std::size_t now = std::min(kMaxTile, unit.unit->count - t);
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

    // Down, one row block per task over all units: the task owns those outputs, so sums need no lock and no second pass.
    const std::size_t blocks = round_up(hidden, kRows) / kRows;
    parallel_for(blocks, [&](std::size_t block) {
        const std::size_t row = block * kRows, width = std::min(kRows, hidden - row);
        for (std::size_t t = 0; t < tokens; ++t) {
            float* out = y + t * hidden + row;
            if (residual == nullptr) {
                std::memset(out, 0, width * sizeof(float));
            } else if (y != residual) {
                std::memcpy(out, residual + t * hidden + row, width * sizeof(float));
            }
        }
        float tile[kMaxTile * kRows];
        for (const PreparedUnit& unit : prepared) {
            for (std::size_t t = 0; t < unit.unit->count; t += kMaxTile) {
                const std::size_t now = std::min(kMaxTile, unit.unit->count - t);
                run_block(kernels, unit.unit->down, block, unit.inner.from(t), now, tile);
                for (std::size_t i = 0; i < now; ++i) {
                    const float weight = unit.weight(t + i);
                    float* out = y + unit.token(t + i) * hidden + row;
                    for (std::size_t r = 0; r < width; ++r) out[r] += weight * tile[i * kRows + r];
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
