// The lines of a text at which reading could resume: the parser's state before the first token of each.
//
// Of lines with the same indent the last few are kept, and none that is indented further than a later one: reading
// never resumes in a block that is closed.
#pragma once

#include "grammar_stack.h"

namespace megacoder::grammar {

struct Line {  // the state before its first token, which begins at `start`
  Node* top;
  uint32_t scanner_state, start, indent;
};

class Lines {
 public:
  Lines(Stacks& stacks, const uint8_t* text, uint32_t size) : stacks_(stacks), text_(text), size_(size) {}
  ~Lines() { keep({}, 0); }

  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;

  const std::vector<Line>& kept() const { return kept_; }

  // Keeps the line whose first token begins at `start`; false where that token is not the first of its line.
  bool mark(Node* top, uint32_t scanner_state, uint32_t start) {
    uint32_t line = start;
    while (line && is_blank(text_[line - 1])) --line;
    if ((line && text_[line - 1] != '\n') || start == size_ || is_end(text_[start])) return false;
    const uint32_t indent = indent_of(line, start);
    if (!kept_.empty() && kept_.back().start == start) return true;
    while (!kept_.empty() && kept_.back().indent > indent) {
      stacks_.release(kept_.back().top);
      kept_.pop_back();
    }
    if (kept_.size() >= kKept && kept_[kept_.size() - kKept].indent == indent) {
      stacks_.release(kept_[kept_.size() - kKept].top);
      kept_.erase(kept_.end() - kKept);
    }
    ++top->references;
    kept_.push_back({top, scanner_state, start, indent});
    return true;
  }

  // Keeps exactly the first `count` of `lines`.
  void keep(const std::vector<Line>& lines, size_t count) {
    for (size_t i = 0; i < count; ++i) ++lines[i].top->references;
    for (const Line& line : kept_) stacks_.release(line.top);
    kept_.assign(lines.begin(), lines.begin() + count);
  }

  // Moves `position` to the next line that is not blank, after its indent; to the end of the text, and false, where
  // there is none.
  bool next(uint32_t& position, uint32_t& indent) const {
    while (const void* end = std::memchr(text_ + position, '\n', size_ - position)) {
      const uint32_t line = static_cast<uint32_t>(static_cast<const uint8_t*>(end) - text_) + 1;
      for (position = line; position < size_ && is_blank(text_[position]); ++position) {}
      indent = indent_of(line, position);
      if (position < size_ && !is_end(text_[position])) return true;
    }
    position = size_;
    return false;
  }

  // The end of the previous line, 0 in the first.
  uint32_t end_before(uint32_t position) const {
    while (position && text_[position - 1] != '\n') --position;
    return position ? position - 1 : 0;
  }

 private:
  static constexpr size_t kKept = 4;  // per indent: a function's header may take as many lines

  static bool is_blank(uint8_t c) { return c == ' ' || c == '\t'; }
  static bool is_end(uint8_t c) { return c == '\n' || c == '\r'; }

  uint32_t indent_of(uint32_t line, uint32_t start) const {
    uint32_t indent = 0;
    for (; line < start; ++line) indent = text_[line] == '\t' ? (indent / 8 + 1) * 8 : indent + 1;
    return indent;
  }

  Stacks& stacks_;
  const uint8_t* text_;
  uint32_t size_;
  std::vector<Line> kept_;
};

}  // namespace megacoder::grammar
