// Megatron's blend of datasets (megacoder/data/megatron_order.py): every sample is of the dataset that is furthest behind
// its share. Each choice depends on all before it, so that NumPy cannot make them at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace megacoder {

inline void blending_indices(const double* weights, int64_t count, int64_t size, int16_t* datasets, int64_t* numbers) {
  std::vector<int64_t> taken(count, 0);
  for (int64_t sample = 0; sample < size; ++sample) {
    const double due = static_cast<double>(std::max<int64_t>(sample, 1));
    int64_t chosen = 0;
    double greatest = 0;
    for (int64_t i = 0; i < count; ++i) {
      volatile const double share = weights[i] * due;  // rounded: a fused multiply-add would choose otherwise
      const double error = share - static_cast<double>(taken[i]);
      if (i == 0 || error > greatest) chosen = i, greatest = error;
    }
    datasets[sample] = static_cast<int16_t>(chosen);
    numbers[sample] = taken[chosen]++;
  }
}

}  // namespace megacoder
