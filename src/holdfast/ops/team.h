// Work divided among PyTorch's own threads; ops/threads.py says why, and finds them.

#pragma once

#include <cstdint>

namespace {

// A team of PyTorch's threads, by the functions that GNU's OpenMP has for it.
struct Team {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*size)();
};

// part(first, end) for ranges that cover `count`, in `workers` threads; `team` may be null for one.
template <class Part>
void divide(const Team* team, int64_t workers, int64_t count, const Part& part) {
  if (workers <= 1) return part(0, count);
  struct Work {
    const Team* team;
    int64_t count;
    const Part& part;
  } work{team, count, part};
  const auto run = [](void* data) {
    const Work& work = *static_cast<Work*>(data);
    const int64_t thread = work.team->thread(), size = work.team->size();  // which may be fewer than asked for
    work.part(work.count * thread / size, work.count * (thread + 1) / size);
  };
  team->run(run, &work, static_cast<unsigned>(workers), 0);
}

}  // namespace
