// A job is a counter that everybody draws tasks from. Workers learn of a new job by its number: they watch it for about 100
// microseconds, then sleep on a condition variable. The caller works too, then waits until no worker is inside the job, so the job's
// data may live on its stack.
#include "kernels/thread_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ernie45 {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

thread_local bool inside_task = false;

class Pool {
   public:
    explicit Pool(int workers) {
        threads_.reserve(static_cast<std::size_t>(workers));
        for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_.store(true);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    void run(std::size_t num_tasks, TaskBody body, void* context) {
        body_ = body;
        context_ = context;
        num_tasks_ = num_tasks;
        next_.store(0, std::memory_order_relaxed);
        // Odd while a job may be entered, even afterwards: workers that come late find the door closed.
        job_.fetch_add(1, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        draw();
        job_.fetch_add(1, std::memory_order_seq_cst);
        while (busy_.load(std::memory_order_seq_cst) > 0) relax();
    }

   private:
    void draw() {
        inside_task = true;
        for (std::size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) body_(context_, task);
        inside_task = false;
    }

    void work() {
        std::uint64_t seen = 0;
        while (true) {
            const std::uint64_t job = await(seen);
            if (stopping_.load()) return;
            // A worker that slept may see the number after the door closed again.
            if ((job & 1) == 0) continue;
            seen = job;
            busy_.fetch_add(1, std::memory_order_seq_cst);
            // The job may have ended between seeing it and entering: then its data is gone.
            if (job_.load(std::memory_order_seq_cst) == job) draw();
            busy_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    // The number of an open job that is not `seen`.
    std::uint64_t await(std::uint64_t seen) {
        const auto open = [&](std::uint64_t job) { return (job & 1) != 0 && job != seen; };
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 64; ++i) {
                const std::uint64_t job = job_.load(std::memory_order_acquire);
                if (open(job) || stopping_.load(std::memory_order_relaxed)) return job;
                relax();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return open(job_.load(std::memory_order_seq_cst)) || stopping_.load(); });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        return job_.load(std::memory_order_seq_cst);
    }

    TaskBody body_ = nullptr;
    void* context_ = nullptr;
    std::size_t num_tasks_ = 0;
    alignas(64) std::atomic<std::size_t> next_{0};
    alignas(64) std::atomic<std::uint64_t> job_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

// One job at a time; also guards the pool's life. Never destroyed: kernels may run while other libraries shut down.
std::mutex& turn() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

Pool* pool = nullptr;
int wanted_threads = 0;

int default_threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

// In a forked child the workers do not exist: forget the pool (its memory is lost, its threads are not ours to join).
void after_fork_in_child() {
    pool = nullptr;
    inside_task = false;
    new (&turn()) std::mutex;
}

void watch_forks() {
    static const int registered = pthread_atfork([] { turn().lock(); }, [] { turn().unlock(); }, after_fork_in_child);
    (void)registered;
}

}  // namespace

void parallel_for(std::size_t num_tasks, TaskBody body, void* context) {
    if (num_tasks == 0) return;
    if (num_tasks == 1 || inside_task) {
        for (std::size_t task = 0; task < num_tasks; ++task) body(context, task);
        return;
    }
    watch_forks();
    std::lock_guard<std::mutex> lock(turn());
    const int threads = wanted_threads > 0 ? wanted_threads : default_threads();
    if (threads == 1) {
        for (std::size_t task = 0; task < num_tasks; ++task) body(context, task);
        return;
    }
    if (pool == nullptr) pool = new Pool(threads - 1);
    pool->run(num_tasks, body, context);
}

int num_threads() {
    std::lock_guard<std::mutex> lock(turn());
    return wanted_threads > 0 ? wanted_threads : default_threads();
}

void set_num_threads(int count) {
    std::lock_guard<std::mutex> lock(turn());
    delete pool;
    pool = nullptr;
    wanted_threads = count;
}

void stop_threads() {
    std::lock_guard<std::mutex> lock(turn());
    delete pool;
    pool = nullptr;
}

}  // namespace ernie45
