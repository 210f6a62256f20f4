// Checks of a dataset's index (megacoder/data/indexed.py), which is mapped at whatever offset its header leaves: at
// unaligned addresses. NumPy copies such arrays before it computes; here they are read once, at memory speed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace megacoder {

constexpr int64_t kChecked = 1 << 15;  // entries checked as one run

template <class T>
inline T load(const char* at, int64_t index) {
  T value;
  std::memcpy(&value, at + index * sizeof(T), sizeof value);
  return value;
}

// Calls right(i) for 0 <= i < count; returns the start of the first run of kChecked entries with a false one, else -1.
template <class Right>
inline int64_t first_wrong(int64_t count, Right right) {
  const int64_t runs = (count + kChecked - 1) / kChecked;
  int64_t first = runs;
#pragma omp parallel for reduction(min : first)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t end = std::min((run + 1) * kChecked, count);
    bool all = true;
    for (int64_t i = run * kChecked; i < end; ++i) all &= right(i);
    if (!all) first = std::min(first, run);
  }
  return first < runs ? first * kChecked : -1;
}

// No length is negative, the first pointer is 0, and every other one is the previous pointer plus that entry's bytes. A
// sum that overflows stays negative for longer than a run, so checking the run's first entry detects it.
inline int64_t first_wrong_sequences(const char* lengths, const char* pointers, int64_t count, int64_t itemsize) {
  return first_wrong(count, [=](int64_t i) {
    const int64_t pointer = load<int64_t>(pointers, i);
    uint64_t expected = 0;
    if (i) expected = load<uint64_t>(pointers, i - 1) + itemsize * int64_t{load<int32_t>(lengths, i - 1)};
    return (load<int32_t>(lengths, i) >= 0) & (static_cast<uint64_t>(pointer) == expected) &
           (pointer >= 0 || i % kChecked != 0);
  });
}

// None of the count + 1 offsets is less than the one before it.
inline int64_t first_falling_offsets(const char* offsets, int64_t count) {
  return first_wrong(count, [=](int64_t i) { return load<int64_t>(offsets, i) <= load<int64_t>(offsets, i + 1); });
}

}  // namespace megacoder
