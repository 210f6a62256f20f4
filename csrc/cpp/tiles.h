// Products of tiles of bf16 (AMX): a 16 x 32 tile times a 32 x 16 tile is added to a 16 x 16 tile of fp32. Included by
// kernels_amx.cpp, which sets the target.
//
// A panel is two tiles side by side, 32 rows or columns of a result; a step is the 32 terms that one instruction sums
// for each element, so the result of a panel of rows and a panel of columns is a sum over steps. The right factor of
// an instruction holds pairs of terms: terms 2r and 2r + 1 of a column are neighbors in row r of its tile. `pack_*`
// brings memory into this order, with zeros beyond the edges of a matrix.
#pragma once

#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace megacoder {
namespace amx {

constexpr int64_t kTile = 16;          // rows of a tile, and columns of 4 bytes
constexpr int64_t kPanel = 2 * kTile;
constexpr int64_t kStep = 32;
constexpr int64_t kTileValues = kTile * kStep;
constexpr int64_t kPanelValues = 2 * kTileValues;  // of one step

inline int64_t panels_of(int64_t size) { return (size + kPanel - 1) / kPanel; }

#ifdef _OPENMP
inline int64_t thread_number() { return omp_get_thread_num(); }
inline int64_t num_threads() { return omp_get_num_threads(); }
inline int64_t max_threads() { return omp_get_max_threads(); }
#else
inline int64_t thread_number() { return 0; }
inline int64_t num_threads() { return 1; }
inline int64_t max_threads() { return 1; }
#endif

// gcc does not know that the intrinsics that load tiles and their configuration read memory: to be called between
// writing it and loading it.
inline void stored() { __asm__ volatile("" ::: "memory"); }

// Configures the calling thread's eight tiles as 16 rows of 64 bytes, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = kTile;
    }
    stored();
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

inline __mmask16 first_of_16(int64_t count) {
  return static_cast<__mmask16>(count >= kTile ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1);
}

inline void transpose(__m512i (&row)[kTile]) {
  __m512i by_two[kTile], by_four[kTile];
  for (int i = 0; i < 16; i += 2) {
    by_two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    by_two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    by_four[i] = _mm512_unpacklo_epi64(by_two[i], by_two[i + 2]);
    by_four[i + 1] = _mm512_unpackhi_epi64(by_two[i], by_two[i + 2]);
    by_four[i + 2] = _mm512_unpacklo_epi64(by_two[i + 1], by_two[i + 3]);
    by_four[i + 3] = _mm512_unpackhi_epi64(by_two[i + 1], by_two[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(by_four[i], by_four[i + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(by_four[i], by_four[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(by_four[i + 8], by_four[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(by_four[i + 8], by_four[i + 12], 0xdd);
    row[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    row[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    row[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

inline void store_tile(bf16* tile, const __m512i (&row)[kTile]) {
  for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(tile + i * kStep, row[i]);
}

// A tile whose terms are rows of `source`: the right factor, or with `left` the left one.
template <bool left>
inline void pack_terms(bf16* tile, const bf16* source, int64_t stride, int64_t terms, int64_t columns) {
  __m512i row[kTile];
  const __mmask16 mask = first_of_16(columns);
  for (int64_t pair = 0; pair < kTile; ++pair) {
    const bf16* const first = source + 2 * pair * stride;
    const __mmask16 one = 2 * pair < terms ? mask : 0, two = 2 * pair + 1 < terms ? mask : 0;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(one, first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(two, first + stride));
    row[pair] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  if (left) transpose(row);
  store_tile(tile, row);
}

// A tile whose terms are columns of `source`: the left factor, or with `right` the right one.
template <bool right>
inline void pack_rows(bf16* tile, const bf16* source, int64_t stride, int64_t rows, int64_t terms) {
  __m512i row[kTile];
  const __mmask32 mask = terms >= kStep ? ~__mmask32{0} : terms <= 0 ? 0 : (__mmask32{1} << terms) - 1;
  for (int64_t i = 0; i < kTile; ++i) row[i] = _mm512_maskz_loadu_epi16(i < rows ? mask : 0, source + i * stride);
  if (right) transpose(row);
  store_tile(tile, row);
}

// Panels of `rows` whose columns are terms, as left factors, or as columns of a right one; a panel's steps follow each
// other.
template <bool right>
inline void pack_panels(bf16* packed, const bf16* source, int64_t stride, int64_t rows, int64_t terms) {
  const int64_t steps = panels_of(terms);
  for (int64_t panel = 0; panel < panels_of(rows); ++panel)
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t row = panel * kPanel + half * kTile;
        pack_rows<right>(packed + (panel * steps + step) * kPanelValues + half * kTileValues,
                         source + row * stride + step * kStep, stride, rows - row, terms - step * kStep);
      }
}

// A right factor whose terms are rows of `source`; a panel of its columns has `room` steps.
inline void pack_right(bf16* packed, const bf16* source, int64_t stride, int64_t terms, int64_t columns, int64_t room) {
  for (int64_t step = 0; step < panels_of(terms); ++step)
    for (int64_t panel = 0; panel < panels_of(columns); ++panel)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t column = panel * kPanel + half * kTile;
        pack_terms<false>(packed + (panel * room + step) * kPanelValues + half * kTileValues,
                          source + step * kStep * stride + column, stride, terms - step * kStep, columns - column);
      }
}

// A left factor in memory: packed, or rows of a matrix whose terms are its columns.
struct Left {
  const bf16* at;
  int64_t row_bytes, second, step;  // to the next row; in elements, to the second tile and to the next step
  static Left packed(const bf16* at) { return {at, 64, kTileValues, kPanelValues}; }
  static Left rows(const bf16* at, int64_t stride) { return {at, stride * 2, kTile * stride, kStep}; }
};

// Tiles 0 to 3 += left x right.
inline void multiply(Left left, const bf16* right, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, left.at += left.step, right += kPanelValues) {
    _tile_loadd(4, left.at, left.row_bytes);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileValues, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left.at + left.second, left.row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// A panel of rows and a panel of columns of `out`: = left x right, or += with `add`.
template <bool add>
inline void product(float* out, int64_t stride, const Left& left, const bf16* right, int64_t steps) {
  float* const below = out + kTile * stride;
  stored();
  if (add) {
    _tile_loadd(0, out, stride * 4);
    _tile_loadd(1, out + kTile, stride * 4);
    _tile_loadd(2, below, stride * 4);
    _tile_loadd(3, below + kTile, stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  multiply(left, right, steps);
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + kTile, stride * 4);
  _tile_stored(2, below, stride * 4);
  _tile_stored(3, below + kTile, stride * 4);
}

// `product<true>` where `out` has only `rows` and `columns`, which may be more than a panel's.
inline void add_product(float* out, int64_t stride, int64_t rows, int64_t columns, const Left& left, const bf16* right,
                        int64_t steps) {
  if (rows >= kPanel && columns >= kPanel) return product<true>(out, stride, left, right, steps);
  alignas(64) float whole[kPanel * kPanel] = {};
  const __mmask16 mask[2] = {first_of_16(columns), first_of_16(columns - kTile)};
  rows = std::min(rows, kPanel);
  for (int64_t part = 0; part < 2 * rows; ++part)
    _mm512_store_ps(whole + part * kTile, _mm512_maskz_loadu_ps(mask[part % 2], out + part / 2 * stride + part % 2 * kTile));
  product<true>(whole, kPanel, left, right, steps);
  for (int64_t part = 0; part < 2 * rows; ++part)
    _mm512_mask_storeu_ps(out + part / 2 * stride + part % 2 * kTile, mask[part % 2], _mm512_load_ps(whole + part * kTile));
}

// A row of sums as bf16, times `factor`.
inline void write_row(bf16* out, const float* values, int64_t count, float factor) {
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += kTile)
    _mm256_mask_storeu_epi16(out + i, first_of_16(count - i),
                             (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(values + i), by)));
}

}  // namespace amx
}  // namespace megacoder
