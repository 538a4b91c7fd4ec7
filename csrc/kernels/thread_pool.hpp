// The thread pool of all kernels: workers spin for a moment after a job, because the next operation follows within microseconds,
// and then sleep. No OpenMP: its threads either spin for good or wake slowly, and it does not survive fork.
#pragma once

#include <cstddef>

namespace ernie45 {

// Runs body(task) for every task of 0 .. num_tasks - 1 and returns when all are done. Tasks are handed out one by one to the caller
// and the workers, so a task must not depend on the thread or on the order. Calls from several threads take turns; a call from
// inside a task runs serially. An exception must not leave the body.
using TaskBody = void (*)(void* context, std::size_t task);
void parallel_for(std::size_t num_tasks, TaskBody body, void* context);

template <typename Body>
void parallel_for(std::size_t num_tasks, const Body& body) {
    parallel_for(
        num_tasks, [](void* context, std::size_t task) { (*static_cast<const Body*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Threads that take part in a job, the caller included. Setting it waits for a running job; 1 means no workers at all.
int num_threads();
void set_num_threads(int count);

// Ends the workers; the next job starts new ones. Called at exit, so that no thread outlives the library.
void stop_threads();

}  // namespace ernie45
