// The text as a grammar's lexer and external scanner read it: one character at a time, UTF-8.
//
// They call it through the function pointers of LexerView, the first member, whose address is therefore the lexer's.
#pragma once

#include <algorithm>

#include "grammar.h"

namespace megacoder::grammar {

class Lexer {
 public:
  Lexer(const uint8_t* text, uint32_t size)
      : view_{0, 0, advance, mark_end, column, at_start, at_end, log}, text_(text), size_(size) {}

  // Moves to `position`, where a token may begin, perhaps after blanks.
  void start(uint32_t position) {
    position_ = token_start_ = position;
    view_.result_symbol = 0;
    is_end_marked_ = false;
    read();
    if (position == 0 && view_.lookahead == kByteOrderMark) advance(&view_, true);
  }

  // A token ends where its end was last marked, or else where reading stopped.
  void finish() {
    if (!is_end_marked_) token_end_ = position_;
    if (token_end_ < token_start_) token_start_ = token_end_;
  }

  LexerView* view() { return &view_; }
  Symbol symbol() const { return view_.result_symbol; }
  uint32_t token_start() const { return token_start_; }
  uint32_t token_end() const { return token_end_; }

 private:
  static constexpr int32_t kByteOrderMark = 0xFEFF;

  static Lexer* of(const LexerView* view) {
    return reinterpret_cast<Lexer*>(const_cast<LexerView*>(view));
  }

  static void advance(LexerView* view, bool skip) {
    Lexer* self = of(view);
    if (self->position_ >= self->size_) return;
    self->position_ += self->width_;
    if (skip) self->token_start_ = self->position_;
    self->read();
  }

  static void mark_end(LexerView* view) {
    of(view)->token_end_ = of(view)->position_;
    of(view)->is_end_marked_ = true;
  }

  static bool at_start(const LexerView* view) { return of(view)->position_ == 0 && of(view)->size_ != 0; }
  static bool at_end(const LexerView* view) { return of(view)->position_ >= of(view)->size_; }
  static void log(const LexerView*, const char*, ...) {}

  // Characters since the line began; continues from the last call's position if that is on the same line.
  static uint32_t column(LexerView* view) {
    Lexer* self = of(view);
    const uint8_t *text = self->text_, *here = text + self->position_;
    const uint8_t* from = text + self->column_position_;
    if (from > here || std::memchr(from, '\n', here - from)) {
      const size_t newline = std::string_view(reinterpret_cast<const char*>(text), here - text).rfind('\n');
      from = newline == std::string_view::npos ? text : text + newline + 1;
      self->column_ = 0;
    }
    for (const uint8_t* at = from; at < here; ++at) self->column_ += (*at & 0xC0) != 0x80;
    if (from == text && here > text && self->begins_with_mark()) --self->column_;
    self->column_position_ = self->position_;
    return self->column_;
  }

  bool begins_with_mark() const { return size_ >= 3 && text_[0] == 0xEF && text_[1] == 0xBB && text_[2] == 0xBF; }

  void read() {
    if (position_ >= size_) {
      view_.lookahead = 0;
      width_ = 0;
    } else if (const uint8_t byte = text_[position_]; byte < 0x80) {
      view_.lookahead = byte;
      width_ = 1;
    } else {
      read_wide(byte);
    }
  }

  // Never reads beyond the end, even of invalid UTF-8.
  void read_wide(uint8_t byte) {
    const uint32_t length = byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    width_ = std::min(length, size_ - position_);
    view_.lookahead = byte & (0x7F >> length);
    for (uint32_t i = 1; i < width_; ++i) view_.lookahead = view_.lookahead << 6 | (text_[position_ + i] & 0x3F);
  }

  LexerView view_;  // first: its address is the lexer's
  const uint8_t* text_;
  uint32_t size_, position_ = 0, width_ = 0, token_start_ = 0, token_end_ = 0;
  uint32_t column_position_ = 0, column_ = 0;
  bool is_end_marked_ = false;
};

}  // namespace megacoder::grammar
