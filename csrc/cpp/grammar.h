// A compiled tree-sitter grammar in memory, ABI 13 to 15, and the look-ups in it.
//
// The layout is that of tree-sitter's lib/src/parser.h (0.26), which every generated parser is compiled against, so it
// cannot change without a new ABI version. Grammars are read-only and never freed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace megacoder::grammar {

using State = uint16_t;
using Symbol = uint16_t;

constexpr Symbol kEnd = 0, kNoSymbol = 0xFFFF;
constexpr State kErrorState = 0, kStartState = 1;
constexpr uint16_t kNoLexState = 0xFFFF;  // after an extra of several tokens: reduce before reading anything
constexpr unsigned kScannerBytes = 1024;  // limit of an external scanner's state: the size of tree-sitter's buffer

// What a grammar's lexer and external scanner see of the text.
struct LexerView {
  int32_t lookahead;
  Symbol result_symbol;
  void (*advance)(LexerView*, bool skip);
  void (*mark_end)(LexerView*);
  uint32_t (*get_column)(LexerView*);
  bool (*is_at_included_range_start)(const LexerView*);
  bool (*eof)(const LexerView*);
  void (*log)(const LexerView*, const char*, ...);
};

enum ActionType : uint8_t { kShift, kReduce, kAccept, kRecover };

union Action {
  uint8_t type;
  struct {
    uint8_t type;
    State state;
    bool extra, repetition;
  } shift;
  struct {
    uint8_t type, child_count;
    Symbol symbol;
    int16_t dynamic_precedence;
    uint16_t production_id;
  } reduce;
  struct {
    uint8_t count;
    bool reusable;
  } entry;  // precedes the actions of one state and symbol
};
static_assert(sizeof(Action) == 8);

struct LexMode {
  uint16_t lex_state, external_lex_state, reserved_words;
  bool operator==(const LexMode& other) const {
    return lex_state == other.lex_state && external_lex_state == other.external_lex_state &&
           reserved_words == other.reserved_words;
  }
};

struct Tables {
  uint32_t abi_version, symbol_count, alias_count, token_count, external_token_count, state_count, large_state_count,
      production_id_count, field_count;
  uint16_t max_alias_sequence_length;
  const uint16_t* parse_table;
  const uint16_t* small_parse_table;
  const uint32_t* small_parse_table_map;
  const Action* parse_actions;
  const char* const* symbol_names;
  const void* field_names;
  const void* field_map_slices;
  const void* field_map_entries;
  const void* symbol_metadata;
  const Symbol* public_symbol_map;
  const uint16_t* alias_map;  // symbol, count, that many aliases of it; in ascending order of symbols, ended by 0
  const Symbol* alias_sequences;
  const uint16_t* lex_modes;  // two numbers per state; three from ABI 15 on
  bool (*lex_fn)(LexerView*, State);
  bool (*keyword_lex_fn)(LexerView*, State);
  Symbol keyword_capture_token;
  struct {
    const bool* states;
    const Symbol* symbol_map;
    void* (*create)();
    void (*destroy)(void*);
    bool (*scan)(void*, LexerView*, const bool* valid_symbols);
    unsigned (*serialize)(void*, char*);
    void (*deserialize)(void*, const char*, unsigned);
  } external_scanner;
  const State* primary_state_ids;
  const char* name;  // from here on only in ABI 15
  const Symbol* reserved_words;
  uint16_t max_reserved_word_set_size;
};

struct Entry {
  const Action* actions;
  uint8_t count;
  bool reusable;
};

class Grammar {
 public:
  // `function_words`: strings that occur in the names of functions' symbols.
  Grammar(const Tables* tables, const std::vector<std::string>& function_words)
      : tables(*tables), cache_(size_t{1} << kCacheBits), is_function_(tables->symbol_count) {
    const auto names_function = [&](Symbol symbol) {
      const std::string_view name = tables->symbol_names[symbol];
      return std::any_of(function_words.begin(), function_words.end(),
                         [&](const std::string& word) { return name.find(word) != name.npos; });
    };
    for (Symbol symbol = 0; symbol < tables->symbol_count; ++symbol) is_function_[symbol] = names_function(symbol);
    for (const uint16_t* at = tables->alias_map; at && *at; at += 2 + at[1])
      for (uint16_t i = 0; i < at[1]; ++i)
        if (names_function(at[2 + i])) is_function_[*at] = true;
  }

  static bool knows(const Tables* tables) { return tables->abi_version >= 13 && tables->abi_version <= 15; }

  Entry entry(State state, Symbol symbol) {
    if (symbol == kNoSymbol) return {nullptr, 0, false};
    const Action* entry = tables.parse_actions + lookup(state, symbol);
    return {entry + 1, entry->entry.count, entry->entry.reusable};
  }

  bool has_actions(State state, Symbol symbol) { return lookup(state, symbol) != 0; }

  State next_state(State state, Symbol symbol) {
    if (symbol >= tables.token_count) return lookup(state, symbol);
    const Entry found = entry(state, symbol);
    if (found.count == 0 || found.actions[found.count - 1].type != kShift) return kErrorState;
    const auto& shift = found.actions[found.count - 1].shift;
    return shift.extra ? state : shift.state;
  }

  LexMode lex_mode(State state) const {
    if (tables.abi_version < 15) return {tables.lex_modes[2 * state], tables.lex_modes[2 * state + 1], 0};
    const uint16_t* mode = tables.lex_modes + 3 * state;
    return {mode[0], mode[1], mode[2]};
  }

  bool is_reserved(State state, Symbol symbol) const {
    const uint16_t set = lex_mode(state).reserved_words;
    const Symbol* words = tables.reserved_words + set * tables.max_reserved_word_set_size;
    for (uint16_t i = 0; set && i < tables.max_reserved_word_set_size && words[i]; ++i)
      if (words[i] == symbol) return true;
    return false;
  }

  // Whether this symbol, or one of its aliases, is a function.
  bool is_function(Symbol symbol) const { return is_function_[symbol]; }

  const Tables& tables;

 private:
  // The rows of most states are lists of groups that must be searched; a direct-mapped cache holds recent answers (with
  // 13 bits C and Scala are 3% slower, with 17 no faster).
  static constexpr int kCacheBits = 15;
  struct Cached {
    uint32_t key = 0xFFFFFFFF;
    uint16_t value = 0;
  };

  uint16_t lookup(State state, Symbol symbol) {
    if (state < tables.large_state_count) return tables.parse_table[state * size_t{tables.symbol_count} + symbol];
    const uint32_t key = uint32_t{state} << 16 | symbol;
    Cached& cached = cache_[key * 0x9E3779B1u >> (32 - kCacheBits)];
    if (cached.key != key) cached = {key, search(state, symbol)};
    return cached.value;
  }

  uint16_t search(State state, Symbol symbol) const {
    const uint16_t* at = tables.small_parse_table + tables.small_parse_table_map[state - tables.large_state_count];
    for (uint16_t groups = *at++; groups; --groups) {
      const uint16_t value = *at++;
      for (uint16_t symbols = *at++; symbols; --symbols)
        if (*at++ == symbol) return value;
    }
    return 0;
  }

  std::vector<Cached> cache_;
  std::vector<bool> is_function_;
};

}  // namespace megacoder::grammar
