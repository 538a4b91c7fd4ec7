// Scratch memory that grows and is kept, aligned to a cache line: a vector register loaded across two lines costs twice.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace ernie45 {

class Scratch {
   public:
    // At least `count` floats, zero when new; what was there before is lost when it grows.
    float* floats(std::size_t count) {
        if (count > capacity_) {
            memory_.reset();
            capacity_ = 0;
            memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), kLine)));
            capacity_ = count;
            for (std::size_t i = 0; i < count; ++i) memory_.get()[i] = 0;
        }
        return memory_.get();
    }

   private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(float* memory) const { ::operator delete(memory, kLine); }
    };
    std::unique_ptr<float, Free> memory_;
    std::size_t capacity_ = 0;
};

}  // namespace ernie45
