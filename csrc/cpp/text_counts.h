// Counts over the characters of a Python string, which megacoder/corpus/text_counts.py defines.
//
// They read the string as stored, at 1, 2 or 4 bytes per character, so that nothing is encoded or split into objects;
// and they ask Python itself what a character is, so that letters are those of str.isalpha, words those of re's \w and
// blanks those of str.strip. The caller holds the GIL.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace megacoder {

enum Kind : uint8_t { kLetter = 1, kWord = 2, kDecimal = 4, kDigit = 8, kBlank = 16 };

inline uint8_t asked_kind(Py_UCS4 c) {
  return (Py_UNICODE_ISALPHA(c) ? kLetter : 0) | (Py_UNICODE_ISALNUM(c) || c == '_' ? kWord : 0) |
         (Py_UNICODE_ISDECIMAL(c) ? kDecimal : 0) | (Py_UNICODE_ISDIGIT(c) ? kDigit : 0) |
         (Py_UNICODE_ISSPACE(c) ? kBlank : 0);
}

struct KindTable {
  uint8_t kinds[256];
  KindTable() {
    for (Py_UCS4 c = 0; c < 256; ++c) kinds[c] = asked_kind(c);
  }
};

inline const uint8_t* latin_kinds() {
  static const KindTable table;
  return table.kinds;
}

template <class Char>
inline uint8_t kind_of(const uint8_t* latin, Char c) {
  if constexpr (sizeof(Char) == 1) return latin[c];
  else return c < 256 ? latin[c] : asked_kind(c);
}

struct LineCounts {
  int64_t lines = 0, longest = 0, in_lines = 0, letters = 0;
};

// A line ends at LF, CR or CRLF; what follows the last one is a line unless it is empty.
template <class Char>
LineCounts count_lines(const Char* text, int64_t size) {
  const uint8_t* latin = latin_kinds();
  LineCounts counts;
  int64_t start = 0;
  const auto end_line = [&](int64_t end) {
    ++counts.lines;
    counts.longest = std::max(counts.longest, end - start);
    counts.in_lines += end - start;
  };
  for (int64_t i = 0; i < size; ++i) {
    const Char c = text[i];
    counts.letters += kind_of(latin, c) & kLetter;
    if (c == '\n' || c == '\r') {
      end_line(i);
      i += c == '\r' && i + 1 < size && text[i + 1] == '\n';
      start = i + 1;
    }
  }
  if (start < size) end_line(size);
  return counts;
}

// The set of distinct runs of a text's characters: an open-addressing hash table of places. Runs are equal only if
// their characters are.
template <class Char>
class DistinctRuns {
 public:
  explicit DistinctRuns(const Char* text) : text_(text), slots_(256) {}

  int64_t count() const { return count_; }

  // Adds a run; whether no equal one was added before.
  bool add(int64_t start, int64_t size) {
    const uint64_t hash = hash_of(reinterpret_cast<const uint8_t*>(text_ + start), size * sizeof(Char));
    for (uint64_t at = hash;; ++at) {
      Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.size == 0) {
        slot = {hash, start, size};
        if (2 * ++count_ > static_cast<int64_t>(slots_.size())) grow();
        return true;
      }
      if (slot.hash == hash && slot.size == size &&
          std::memcmp(text_ + slot.start, text_ + start, size * sizeof(Char)) == 0)
        return false;
    }
  }

 private:
  struct Slot {
    uint64_t hash = 0;
    int64_t start = 0, size = 0;  // no run is empty
  };

  static uint64_t hash_of(const uint8_t* at, int64_t size) {
    uint64_t hash = static_cast<uint64_t>(size), value = 0;
    for (; size >= 8; size -= 8, at += 8) {
      std::memcpy(&value, at, 8);
      hash = mixed(hash ^ value);
    }
    value = 0;
    std::memcpy(&value, at, size);
    return mixed(hash ^ value);
  }

  static uint64_t mixed(uint64_t hash) {
    hash *= 0x9e3779b97f4a7c15ULL;
    return hash ^ (hash >> 32);
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.size == 0) continue;
      uint64_t at = slot.hash;
      while (slots_[at & (slots_.size() - 1)].size) ++at;
      slots_[at & (slots_.size() - 1)] = slot;
    }
  }

  const Char* text_;
  std::vector<Slot> slots_;
  int64_t count_ = 0;
};

struct WordCounts {
  int64_t words = 0, numbers = 0, names = 0, short_names = 0, lines = 0, distinct_lines = 0;
};

// A word begins with a letter or `_`, or is a number: a decimal digit and the word characters and dots that follow.
template <class Char>
WordCounts count_words(const Char* text, int64_t size) {
  const uint8_t* latin = latin_kinds();
  WordCounts counts;
  DistinctRuns<Char> names(text), lines(text);
  for (int64_t i = 0; i < size;) {
    const uint8_t kind = kind_of(latin, text[i]);
    const int64_t start = i++;
    if (!(kind & kWord)) continue;
    ++counts.words;
    if (kind & kDecimal) {
      while (i < size && (text[i] == '.' || (kind_of(latin, text[i]) & kWord))) ++i;
      ++counts.numbers;
      continue;
    }
    while (i < size && (kind_of(latin, text[i]) & kWord)) ++i;
    if (kind & kDigit) ++counts.numbers;
    else if (names.add(start, i - start)) counts.short_names += i - start < 3;
  }
  for (int64_t start = 0; start < size;) {
    int64_t end = start;
    while (end < size && text[end] != '\n') ++end;
    int64_t first = start, last = end;
    while (first < last && (kind_of(latin, text[first]) & kBlank)) ++first;
    while (first < last && (kind_of(latin, text[last - 1]) & kBlank)) --last;
    if (first < last) {
      ++counts.lines;
      lines.add(first, last - first);
    }
    start = end + 1;
  }
  counts.names = names.count();
  counts.distinct_lines = lines.count();
  return counts;
}

}  // namespace megacoder
