// Calls every kernel over odd sizes, on every instruction set of this CPU and several thread counts, with all buffers exactly as large as
// the kernels may touch. Built with sanitizers by tests/kernels/test_sanitizers.py, which runs it; it prints "clean" at the end.
// Results must be the same bits everywhere, which is checked too.
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/isa.hpp"
#include "kernels/packed_ops.hpp"
#include "kernels/router.hpp"
#include "kernels/sampling.hpp"
#include "kernels/thread_pool.hpp"

namespace {

using namespace ernie45;

std::mt19937 engine(1);

// Exactly `count` values on the heap, so that one step beyond is seen.
template <typename T>
std::unique_ptr<T[]> exactly(std::size_t count) {
    return std::unique_ptr<T[]>(new T[count]());
}

std::unique_ptr<float[]> normal(std::size_t count) {
    std::normal_distribution<float> draw;
    auto values = exactly<float>(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = draw(engine);
    return values;
}

template <typename T>
std::unique_ptr<T[]> bytes(std::size_t count) {
    auto values = exactly<T>(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<T>(engine() & 0xFF);
    return values;
}

// Runs body(output) on every instruction set and thread count and compares the bits.
template <typename Body>
void everywhere(const char* what, std::size_t outputs, const Body& body) {
    auto first = exactly<float>(outputs);
    bool have_first = false;
    for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
        if (!set_isa(isa)) continue;
        for (const int threads : {1, 3}) {
            set_num_threads(threads);
            auto out = exactly<float>(outputs);
            body(out.get());
            if (have_first && std::memcmp(first.get(), out.get(), outputs * sizeof(float)) != 0) {
                std::printf("%s: instruction set %d with %d threads gives other bits\n", what, static_cast<int>(isa), threads);
                std::exit(1);
            }
            if (!have_first) first.swap(out);
            have_first = true;
        }
    }
}

struct Matrix {
    Packed view;
    std::unique_ptr<std::uint8_t[]> weights;
    std::unique_ptr<std::uint16_t[]> scales;
};

Matrix matrix(std::size_t rows, std::size_t columns, int bits, std::size_t groups_per_scale, bool wide,
              bool minima = false) {
    Matrix m;
    m.view.minima = minima;
    m.view.wide = wide;
    m.view.rows = rows;
    m.view.columns = columns;
    m.view.bits = bits;
    m.view.groups_per_scale = groups_per_scale == 0 ? m.view.groups() : groups_per_scale;
    m.weights = bytes<std::uint8_t>(m.view.blocks() * m.view.groups() * m.view.group_bytes());
    const std::size_t scales = m.view.blocks() * m.view.scale_sets() * m.view.set_size();
    m.scales = exactly<std::uint16_t>(scales);
    for (std::size_t i = 0; i < scales; ++i) m.scales[i] = static_cast<std::uint16_t>(0x2000 + (engine() & 0xFFF));
    m.view.weights = m.weights.get();
    m.view.scales = m.scales.get();
    return m;
}

void packed_products() {
    for (const auto& [bits, wide] : std::vector<std::pair<int, bool>>{{4, false}, {4, true}, {8, false}, {8, true}}) {
        for (const std::size_t group : {0, 1, 2}) {
            const bool minima = bits == 4 && group == 1;
            for (const auto& [rows, columns, tokens] :
                 std::vector<std::array<std::size_t, 3>>{{1, 1, 1}, {33, 130, 5}, {16, 64, 8}, {70, 700, 60}, {5, 65, 0}}) {
                const Matrix m = matrix(rows, columns, bits, group, wide, minima);
                const auto x = normal(tokens * columns), bias = normal(rows), residual = normal(tokens * rows);
                everywhere("linear", tokens * rows, [&](float* y) {
                    packed_linear(x.get(), tokens, m.view, bias.get(), residual.get(), y);
                });
                everywhere("top", tokens, [&](float* y) {
                    const auto ids = exactly<std::int64_t>(tokens);
                    packed_top(x.get(), tokens, m.view, bias.get(), 1, y, ids.get());
                });
                everywhere("row", columns, [&](float* y) { packed_row(m.view, rows - 1, y); });
            }
            const std::size_t hidden = 130, tokens = 9;
            std::vector<Matrix> kept;
            std::vector<FfnUnit> units;
            const auto chosen = exactly<std::int32_t>(4);
            const auto weights = normal(4), x = normal(tokens * hidden), residual = normal(tokens * hidden);
            for (std::size_t i = 0; i < 4; ++i) chosen[i] = static_cast<std::int32_t>(2 * i);
            for (const std::size_t width : {70, 200, 64}) {
                FfnUnit unit;
                kept.push_back(matrix(2 * round_up(width, kGroup), hidden, bits, group, wide, minima));
                unit.gate_up = kept.back().view;
                kept.push_back(matrix(hidden, width, bits, group, !wide, minima));
                unit.down = kept.back().view;
                unit.count = width == 70 ? 4 : width == 200 ? 0 : tokens;
                unit.tokens = width == 70 ? chosen.get() : nullptr;
                unit.weights = width == 70 ? weights.get() : nullptr;
                units.push_back(unit);
            }
            everywhere("ffn", tokens * hidden, [&](float* y) {
                packed_ffn(x.get(), tokens, hidden, units.data(), units.size(), residual.get(), y);
            });
        }
    }
}

void norms() {
    for (const std::size_t width : {1, 15, 16, 17, 1000}) {
        for (const std::size_t tokens : {0, 1, 50}) {
            const auto x = normal(tokens * width), weight = normal(width), residual = normal(tokens * width);
            everywhere("rms_norm", 2 * tokens * width, [&](float* y) {
                rms_norm(x.get(), tokens, width, weight.get(), 1e-5f, residual.get(), y + tokens * width, y);
            });
        }
    }
}

void attentions() {
    const std::vector<std::int32_t> fresh{1, 20, 0, 3}, lengths{280, 40, 0, 17};
    for (const KvType type : {KvType::kFloat32, KvType::kBfloat16, KvType::kInt8}) {
        for (const auto& [heads, groups, dim, slots] :
             std::vector<std::array<std::size_t, 4>>{{10, 2, 64, 16}, {3, 3, 48, 7}, {2, 1, 256, 64}, {9, 1, 16, 300}}) {
            const std::size_t per_sequence = (280 + slots - 1) / slots, pages = 4 * per_sequence, tokens = 24;
            const auto table = exactly<std::int32_t>(pages);
            for (std::size_t i = 0; i < pages; ++i) table[i] = static_cast<std::int32_t>((i * 7 + 3) % pages);
            // 7 and the number of pages share a factor for some sizes: then in order.
            if (pages % 7 == 0) {
                for (std::size_t i = 0; i < pages; ++i) table[i] = static_cast<std::int32_t>(i);
            }
            const std::size_t entries = pages * groups * slots;
            const std::size_t width = type == KvType::kFloat32 ? 4 : type == KvType::kBfloat16 ? 2 : 1;
            const auto keys = exactly<float>((entries * dim * width + 3) / 4), values = exactly<float>((entries * dim * width + 3) / 4);
            const bool scaled = type == KvType::kInt8;
            const auto key_scales = normal(scaled ? entries : 0), value_scales = normal(scaled ? entries : 0);
            KvStore store;
            store.type = type;
            store.pages = pages;
            store.heads = groups;
            store.slots = slots;
            store.head_dim = dim;
            const auto half = [&](float* base, float* scales) {
                const auto head_stride = static_cast<std::ptrdiff_t>(slots * dim), scale_stride = static_cast<std::ptrdiff_t>(slots);
                const auto count = static_cast<std::ptrdiff_t>(groups);
                return KvHalf{base, head_stride * count, head_stride, scaled ? scales : nullptr, scale_stride * count, scale_stride};
            };
            store.keys = half(keys.get(), key_scales.get());
            store.values = half(values.get(), value_scales.get());
            const Sequences sequences{4, fresh.data(), lengths.data(), table.get(), per_sequence};
            const auto qkv = normal(tokens * (heads + 2 * groups) * dim), rotation = normal(tokens * dim);
            const std::size_t outputs = tokens * heads * dim;
            // One store for all sequences, then the same one for each.
            const KvStore* const each[4] = {&store, &store, &store, &store};
            for (const std::size_t count : {1, 4}) {
                const KvStores stores{each, count};
                everywhere("attention", 2 * outputs, [&](float* out) {
                    rope_append(qkv.get(), heads, rotation.get(), stores, sequences, out);
                    attention(out, heads, stores, sequences, 0.1f, out + outputs);
                });
                everywhere("attend", outputs,
                           [&](float* out) { attend(qkv.get(), heads, rotation.get(), stores, sequences, 0.1f, out); });
            }
        }
    }
}

void routers() {
    for (const auto& [tokens, hidden, experts, active] :
         std::vector<std::array<std::size_t, 4>>{{1, 256, 64, 6}, {50, 33, 17, 17}, {0, 16, 4, 2}, {3, 5, 1, 1}}) {
        const auto x = normal(tokens * hidden), gate = normal(experts * hidden), bias = normal(experts);
        Router router;
        router.gate = gate.get();
        router.bias = bias.get();
        router.experts = experts;
        router.hidden = hidden;
        router.active = active;
        router.norm_min = 1e-12f;
        const auto ids = exactly<std::int32_t>(tokens * active), ordered = exactly<std::int32_t>(tokens * active);
        const auto counts = exactly<std::int64_t>(experts);
        everywhere("route", 2 * tokens * active, [&](float* weights) {
            route(x.get(), tokens, router, {weights, ids.get(), counts.get(), ordered.get(), weights + tokens * active});
        });
    }
}

void samplings() {
    for (const std::size_t count : {1, 15, 16, 17, 512, 513, 3000}) {
        const auto logits = normal(count);
        for (std::size_t i = 0; i < count; ++i) logits[i] *= i % 3 == 0 ? 300.0f : 3.0f;
        for (const double top_p : {1.0, 0.9, 0.1}) {
            everywhere("draw", 50, [&](float* ids) {
                for (std::uint64_t seed = 0; seed < 50; ++seed) {
                    ids[seed] = static_cast<float>(draw(logits.get(), count, 70.0, top_p, seed, 3));
                }
            });
        }
        everywhere("logprob", 2, [&](float* out) {
            const double found = logprob(logits.get(), count, count - 1);
            std::memcpy(out, &found, sizeof found);
        });
        const std::size_t part = count < kSamplingBlock ? count : kSamplingBlock;
        everywhere("weights", 2 * part, [&](float* out) {
            const auto weights = exactly<double>(part);
            sampling_kernels().weights(logits.get(), part, 1000.0f, 0.9, weights.get());
            for (std::size_t i = 0; i < part; ++i) {
                const double x = static_cast<double>(logits[i] - 1000.0f) * 0.9, expected = x < -708 ? 0 : std::exp(x);
                if (std::abs(weights[i] - expected) <= 1e-15 * expected) continue;
                std::printf("e^%.17g is %.17g, not %.17g\n", x, expected, weights[i]);
                std::exit(1);
            }
            std::memcpy(out, weights.get(), part * sizeof(double));
        });
    }
}

// Jobs from several threads, while another changes the thread count and one job sleeps between two.
void pool() {
    std::vector<std::thread> threads;
    for (int caller = 0; caller < 3; ++caller) {
        threads.emplace_back([caller] {
            for (int repeat = 0; repeat < 200; ++repeat) {
                std::vector<int> hits(37, 0);
                parallel_for(hits.size(), [&](std::size_t task) {
                    parallel_for(2, [&](std::size_t) { ++hits[task]; });
                });
                for (const int count : hits) {
                    if (count != 2) std::abort();
                }
                if (caller == 0 && repeat % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        });
    }
    for (int repeat = 0; repeat < 60; ++repeat) set_num_threads(1 + repeat % 4);
    for (auto& thread : threads) thread.join();
}

}  // namespace

int main() {
    packed_products();
    norms();
    attentions();
    routers();
    samplings();
    pool();
    stop_threads();
    std::puts("clean");
}
