// The tokens of a text as a grammar reads them: they depend on the parser's state and, where the grammar has an
// external scanner, on the scanner's state.
//
// The scanner serializes its state to bytes; each distinct state gets a number, the empty one 0.
#pragma once

#include <unordered_map>

#include "grammar_lexer.h"

namespace megacoder::grammar {

struct Token {
  Symbol symbol = kNoSymbol;
  State state = 0;  // parser state in which it was read
  uint32_t start = 0, end = 0, scanner_state = 0;
  bool is_external = false, is_keyword = false;
};

class Tokens {
 public:
  Tokens(Grammar& grammar, const uint8_t* text, uint32_t size) : grammar_(grammar), lexer_(text, size) {
    const auto& scanner = grammar_.tables.external_scanner;
    if (scanner.states && scanner.create) scanner_ = scanner.create();
  }

  ~Tokens() {
    const auto& scanner = grammar_.tables.external_scanner;
    if (scanner.states && scanner.destroy) scanner.destroy(scanner_);
  }

  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;

  // The next token as read in `state`; its symbol is kNoSymbol if there is no valid one. False where a reduction must
  // come before the next token.
  bool read(State state, uint32_t position, uint32_t scanner_state, Token& token) {
    LexMode mode = grammar_.lex_mode(state);
    if (mode.lex_state == kNoLexState) return false;
    token = {};
    token.state = state;
    bool is_found = find(mode, position, scanner_state, false, token);
    if (!is_found) is_found = find(grammar_.lex_mode(kErrorState), position, scanner_state, true, token);  // all tokens
    if (!is_found) token.start = token.end = lexer_.token_start();
    cached_ = token;
    cached_position_ = position;
    cached_scanner_state_ = scanner_state;
    return true;
  }

  // The token that was read last, if it was read at the same place and would be read the same way in `state`.
  bool reuse(State state, uint32_t position, uint32_t scanner_state, Token& token, Entry& entry) {
    if (cached_.symbol == kNoSymbol || cached_position_ != position || cached_scanner_state_ != scanner_state) return false;
    const LexMode here = grammar_.lex_mode(state);
    if (here.lex_state == kNoLexState) return false;
    entry = grammar_.entry(state, cached_.symbol);
    token = cached_;
    const bool is_word = token.symbol == grammar_.tables.keyword_capture_token;
    if (entry.count && here == grammar_.lex_mode(token.state) && (!is_word || (!token.is_keyword && token.state == state)))
      return true;
    if (token.start == token.end && token.symbol != kEnd) return false;
    return here.external_lex_state == 0 && entry.reusable;
  }

 private:
  bool find(LexMode mode, uint32_t position, uint32_t scanner_state, bool is_error, Token& token) {
    if (mode.external_lex_state && scan(mode.external_lex_state, position, scanner_state, is_error, token)) return true;
    lexer_.start(position);
    if (!grammar_.tables.lex_fn(lexer_.view(), mode.lex_state)) return false;
    take(token, lexer_.symbol());
    if (token.symbol == grammar_.tables.keyword_capture_token && token.symbol != kEnd) look_for_keyword(token);
    return true;
  }

  void take(Token& token, Symbol symbol) {
    lexer_.finish();
    token.symbol = symbol;
    token.start = lexer_.token_start();
    token.end = lexer_.token_end();
  }

  bool scan(uint16_t external_lex_state, uint32_t position, uint32_t scanner_state, bool is_error, Token& token) {
    const auto& scanner = grammar_.tables.external_scanner;
    const bool* valid = scanner.states + external_lex_state * grammar_.tables.external_token_count;
    const std::string& before = *states_[scanner_state];
    lexer_.start(position);
    scanner.deserialize(scanner_, before.empty() ? nullptr : before.data(), static_cast<unsigned>(before.size()));
    if (!scanner.scan(scanner_, lexer_.view(), valid)) return false;
    const unsigned size = scanner.serialize(scanner_, bytes_);
    if (size > kScannerBytes) return false;
    const std::string_view after(bytes_, size);
    const bool is_changed = after != before;
    Token found = token;
    take(found, scanner.symbol_map[lexer_.symbol()]);
    if (found.end <= position && !is_changed && (is_error || grammar_.next_state(token.state, found.symbol) == token.state))
      return false;  // an empty token that changes no state would repeat forever
    found.is_external = true;
    found.scanner_state = is_changed ? number_of(after) : scanner_state;
    token = found;
    return true;
  }

  void look_for_keyword(Token& token) {
    lexer_.start(token.start);
    token.is_keyword = grammar_.tables.keyword_lex_fn(lexer_.view(), 0);
    lexer_.finish();
    const Symbol keyword = lexer_.symbol();
    if (token.is_keyword && lexer_.token_end() == token.end &&
        (grammar_.has_actions(token.state, keyword) || grammar_.is_reserved(token.state, keyword)))
      token.symbol = keyword;
  }

  uint32_t number_of(std::string_view state) {
    const auto [found, is_new] = numbers_.try_emplace(std::string(state), static_cast<uint32_t>(states_.size()));
    if (is_new) states_.push_back(&found->first);
    return found->second;
  }

  Grammar& grammar_;
  Lexer lexer_;
  void* scanner_ = nullptr;
  std::unordered_map<std::string, uint32_t> numbers_{{"", 0}};
  std::vector<const std::string*> states_{&numbers_.begin()->first};
  char bytes_[kScannerBytes];
  Token cached_;
  uint32_t cached_position_ = 0, cached_scanner_state_ = 0;
};

}  // namespace megacoder::grammar
