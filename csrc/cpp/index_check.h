// Checks of a dataset's index (megacoder/data/indexed.py), which is mapped where its header leaves it: at addresses that
// are no multiple of anything. NumPy copies such arrays before it computes; here they pass by once, at memory's speed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace megacoder {

constexpr int64_t kChecked = 1 << 15;  // entries looked at as one

template <class T>
inline T load(const char* at, int64_t index) {
  T value;
  std::memcpy(&value, at + index * sizeof(T), sizeof value);
  return value;
}

// Calls right(i) for 0 <= i < count; the start of the first run of kChecked in which one is not, -1 where all are.
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

// No length is negative, and every pointer is the one before it and that one's bytes; the first is 0. A sum that wraps
// stays negative for longer than a run, so its first entry shows it.
inline int64_t first_wrong_sequences(const char* lengths, const char* pointers, int64_t count, int64_t itemsize) {
  return first_wrong(count, [=](int64_t i) {
    const int64_t pointer = load<int64_t>(pointers, i);
    uint64_t expected = 0;
    if (i) expected = load<uint64_t>(pointers, i - 1) + itemsize * int64_t{load<int32_t>(lengths, i - 1)};
    return (load<int32_t>(lengths, i) >= 0) & (static_cast<uint64_t>(pointer) == expected) &
           (pointer >= 0 || i % kChecked != 0);
  });
}

// None of count + 1 offsets is less than the one before it.
inline int64_t first_falling_offsets(const char* offsets, int64_t count) {
  return first_wrong(count, [=](int64_t i) { return load<int64_t>(offsets, i) <= load<int64_t>(offsets, i + 1); });
}

}  // namespace megacoder
