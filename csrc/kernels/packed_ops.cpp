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

// Rounded activations with their memory. Kept per calling thread, so that a step allocates nothing.
struct RoundedBuffer {
    std::vector<std::int8_t> values;
    std::vector<float> scales;
    std::vector<std::int32_t> sums;
    std::size_t groups = 0;

    void resize(std::size_t rows, std::size_t columns) {
        groups = round_up(columns, kGroup) / kGroup;
        values.resize(rows * groups * kGroup);
        scales.resize(rows * groups);
        sums.resize(rows * groups);
    }

    Rounded row(std::size_t index) const {
        return {values.data() + index * groups * kGroup, scales.data() + index * groups, sums.data() + index * groups};
    }

    void round_row(const float* x, std::size_t columns, std::size_t row, const BlockKernels& kernels) {
        for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t at = row * groups + g;
            const float* group = x + g * kGroup;
            float padded[kGroup];
            if ((g + 1) * kGroup > columns) {
                std::memset(padded, 0, sizeof padded);
                std::memcpy(padded, group, (columns - g * kGroup) * sizeof(float));
                group = padded;
            }
            kernels.round(group, values.data() + at * kGroup, &scales[at], &sums[at]);
        }
    }

    void copy_row(const RoundedBuffer& other, std::size_t from, std::size_t to) {
        std::memcpy(values.data() + to * groups * kGroup, other.values.data() + from * groups * kGroup, groups * kGroup);
        std::memcpy(scales.data() + to * groups, other.scales.data() + from * groups, groups * sizeof(float));
        std::memcpy(sums.data() + to * groups, other.sums.data() + from * groups, groups * sizeof(std::int32_t));
    }
};

struct Scratch {
    RoundedBuffer x, gathered, inner;
    std::vector<std::size_t> first_row;
};

Scratch& scratch() {
    thread_local Scratch buffers;
    return buffers;
}

void round_rows(const float* x, std::size_t rows, std::size_t columns, RoundedBuffer& out, const BlockKernels& kernels) {
    out.resize(rows, columns);
    const auto one = [&](std::size_t row) { out.round_row(x + row * columns, columns, row, kernels); };
    // A few rows are rounded in less time than a second thread needs to wake.
    if (rows * columns < 32 * 1024) {
        for (std::size_t row = 0; row < rows; ++row) one(row);
    } else {
        parallel_for(rows, one);
    }
}

void run_block(const BlockKernels& kernels, const Packed& m, std::size_t block, const Rounded& x, std::size_t tokens, float* out) {
    (m.bits == 4 ? kernels.block4 : kernels.block8)(m.block_weights(block), m.block_scales(block), m.groups(),
                                                    m.groups_per_scale, x, tokens, out);
}

std::size_t blocks_per_task(const Packed& m) {
    const std::size_t bytes = m.groups() * m.group_bytes();
    return std::max<std::size_t>(1, kTaskBytes / std::max<std::size_t>(1, bytes));
}

// Tokens whose rounded rows stay in cache, in whole tiles.
std::size_t tokens_per_pass(std::size_t groups) {
    return std::max(kMaxTile, kCachedBytes / (groups * kGroup) / kMaxTile * kMaxTile);
}

}  // namespace

void packed_linear(const float* x, std::size_t tokens, const Packed& m, const float* bias, const float* residual, float* y) {
    if (tokens == 0) return;
    const BlockKernels& kernels = block_kernels();
    RoundedBuffer& rounded = scratch().x;
    round_rows(x, tokens, m.columns, rounded, kernels);
    const std::size_t per_task = blocks_per_task(m), per_pass = tokens_per_pass(m.groups());
    parallel_for(round_up(m.blocks(), per_task) / per_task, [&](std::size_t task) {
        const std::size_t first = task * per_task, last = std::min(first + per_task, m.blocks());
        float tile[kMaxTile * kRows];
        for (std::size_t pass = 0; pass < tokens; pass += per_pass) {
            for (std::size_t block = first; block < last; ++block) {
                const std::size_t row = block * kRows, width = std::min(kRows, m.rows - row);
                for (std::size_t t = pass; t < std::min(pass + per_pass, tokens); t += kMaxTile) {
                    const std::size_t now = std::min({kMaxTile, tokens - t, pass + per_pass - t});
                    run_block(kernels, m, block, rounded.row(t), now, tile);
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
    RoundedBuffer &rounded = buffers.x, &gathered = buffers.gathered, &inner = buffers.inner;
    round_rows(x, tokens, hidden, rounded, kernels);

    // Rows of the gathered inputs and of the inner activations: the tokens of unit 0, then those of unit 1, and so on.
    std::vector<std::size_t>& first_row = buffers.first_row;
    first_row.assign(1, 0);
    std::size_t widest = 0, gate_tasks = 0;
    for (std::size_t u = 0; u < num_units; ++u) {
        first_row.push_back(first_row.back() + units[u].count);
        widest = std::max(widest, units[u].down.columns);
        gate_tasks += units[u].count == 0 ? 0 : units[u].down.groups();
    }
    gathered.resize(first_row.back(), hidden);
    inner.resize(first_row.back(), widest);
    for (std::size_t u = 0; u < num_units; ++u) {
        for (std::size_t i = 0; i < units[u].count; ++i) {
            const std::size_t token = units[u].tokens == nullptr ? i : static_cast<std::size_t>(units[u].tokens[i]);
            gathered.copy_row(rounded, token, first_row[u] + i);
        }
    }

    // Gate and up, 64 inner values per task: they are one group of the next product and are rounded on the spot.
    const auto inner_row = [&](std::size_t u, std::size_t i) {
        // Rows of narrower units are stored with their own number of groups.
        const std::size_t groups = units[u].down.groups(), base = first_row[u] * inner.groups;
        const std::size_t at = base + i * groups;
        return Rounded{inner.values.data() + at * kGroup, inner.scales.data() + at, inner.sums.data() + at};
    };
    parallel_for(gate_tasks, [&](std::size_t task) {
        std::size_t u = 0;
        while (units[u].count == 0 || task >= units[u].down.groups()) {
            task -= units[u].count == 0 ? 0 : units[u].down.groups();
            ++u;
        }
        const Packed& m = units[u].gate_up;
        float gate[kMaxTile * kRows], up[kMaxTile * kRows], product[kMaxTile][kGroup];
        for (std::size_t t = 0; t < units[u].count; t += kMaxTile) {
            const std::size_t now = std::min(kMaxTile, units[u].count - t);
            const Rounded in = gathered.row(first_row[u] + t);
            for (std::size_t b = 0; b < kBlocksOf64; ++b) {
                const std::size_t block = 2 * (task * kBlocksOf64 + b);
                run_block(kernels, m, block, in, now, gate);
                run_block(kernels, m, block + 1, in, now, up);
                for (std::size_t i = 0; i < now; ++i) kernels.swiglu(gate + i * kRows, up + i * kRows, product[i] + b * kRows);
            }
            for (std::size_t i = 0; i < now; ++i) {
                const Rounded row = inner_row(u, t + i);
                kernels.round(product[i], const_cast<std::int8_t*>(row.values) + task * kGroup,
                              const_cast<float*>(row.scales) + task, const_cast<std::int32_t*>(row.sums) + task);
            }
        }
    });

    // Down, a range of row blocks per task over all units: the task owns those outputs, so sums need no lock and no second pass.
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
        for (std::size_t u = 0; u < num_units; ++u) {
            for (std::size_t t = 0; t < units[u].count; t += kMaxTile) {
                const std::size_t now = std::min(kMaxTile, units[u].count - t);
                run_block(kernels, units[u].down, block, inner_row(u, t), now, tile);
                for (std::size_t i = 0; i < now; ++i) {
                    const std::size_t token = units[u].tokens == nullptr ? t + i : static_cast<std::size_t>(units[u].tokens[t + i]);
                    const float weight = units[u].weights == nullptr ? 1.0f : units[u].weights[t + i];
                    float* out = y + token * hidden + row;
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
        int value;
        if (m.bits == 8) {
            value = group[c / 4 * 64 + 4 * r + c % 4] - kOffset8;
        } else {
            const std::uint8_t byte = group[c / 8 * 64 + 4 * r + c % 4];
            value = (c % 8 < 4 ? byte & 15 : byte >> 4) - kOffset4;
        }
        y[column] = static_cast<float>(value) * half_to_float(scales[g / m.groups_per_scale * kRows + r]);
    }
}

}  // namespace ernie45
