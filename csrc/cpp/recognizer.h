// Whether a text has no, or few, syntax errors in a tree-sitter grammar, by the grammar's own tables, without a tree.
//
// tree-sitter builds, balances and frees a tree for every file, but for most files only that answer is needed. This is
// its algorithm without trees: LR on a stack of states; where a table has several actions the stack forks, and forks
// that reach the same state at the same place merge. A fork that cannot continue is dropped; the text is good if one
// fork reaches its end. tree-sitter parses such a text without an error, unless it has too many forks and drops the
// only right one.
//
// Around an error whole lines are skipped, from a line before it up to a line after it from which reading succeeds.
// What they would have closed may stay open at the end of the text where that is allowed. A text that is declined may
// still be good: it has too many forks at once, or nothing that was tried after an error succeeds, or a function in it
// is longer than the caller's limit. Then parse it.
#pragma once

#include "grammar_lines.h"
#include "grammar_tokens.h"

namespace megacoder::grammar {

struct Limits {
  double function_lines;  // most lines that a function may span
  uint32_t left_out;      // most bytes that may be skipped
  bool open_end;          // whether what skipped lines with a } or # would have closed may stay open
};

// The reading of one text.
class Reading {
 public:
  Reading(Grammar& grammar, Stacks& stacks, const uint8_t* text, uint32_t size, const Limits& limits)
      : grammar_(grammar), stacks_(stacks), tokens_(grammar, text, size), lines_(stacks, text, size), text_(text),
        size_(size), limits_(limits), steps_left_(1000 + 8 * int64_t{size}) {
    stacks_.start(steps_left_);
    versions_ = {{stacks_.make(nullptr, kStartState, 0, false), 0, kActive}};
  }

  ~Reading() {
    for (const Version& version : versions_) stacks_.release(version.top);
  }

  // How many bytes were skipped so that the rest is good; -1 where that is not known.
  int64_t left_out() {
    run();
    while (!is_accepted_ && !is_declined() && recover()) run();
    return is_accepted_ && !is_declined() ? int64_t{left_out_} : -1;
  }

 private:
  static constexpr size_t kMostVersions = 8;  // tree-sitter drops any over 6
  static constexpr int kTries = 8;  // lines after an error; 16 accept hardly more of 1,383 C files with errors
  static constexpr int kNone = -1;

  enum Status { kActive, kStuck, kMerged };
  struct Version {
    Node* top;
    uint32_t scanner_state;
    Status status;
  };
  struct Proof {  // that reading succeeds: reaching a line after `start` that is indented no further than `indent`
    uint32_t start, indent;
  };
  static constexpr Proof kNoProof{0xFFFFFFFF, 0};

  bool is_declined() const { return is_declined_ || stacks_.is_overfull || steps_left_ < 0; }

  // Versions take turns advancing, so that none is a token ahead when they are compared.
  void run() {
    uint32_t reached = 0;
    is_proven_ = false;
    while (!versions_.empty() && !is_accepted_ && !is_declined() && !is_proven_) {
      for (size_t i = 0; i < versions_.size() && !is_accepted_; ++i) {
        while (versions_[i].status == kActive && !is_accepted_) {
          --steps_left_;
          advance(i);
          if (is_declined()) return;
          const uint32_t position = versions_[i].top->position;
          if (position > reached || (i > 0 && position == reached)) {
            reached = position;
            break;
          }
        }
      }
      if (versions_.size() > 1 || versions_[0].status != kActive) condense();
    }
    if (versions_.empty() && furthest_ == size_ && may_be_open_ && !lines_.kept().empty()) {
      left_out_ += size_ - lines_.kept().back().start;  // everything that an open string may have swallowed
      is_accepted_ = left_out_ <= limits_.left_out;
    }
  }

  // Advances a version until it shifts the next token, or ends.
  void advance(size_t index) {
    const uint32_t position = versions_[index].top->position, scanner_state = versions_[index].scanner_state;
    State state = versions_[index].top->state;
    Entry entry{};
    Token token;
    bool is_read = tokens_.reuse(state, position, scanner_state, token, entry), is_empty = false;
    while (!is_declined()) {
      if (!is_read) {
        is_read = true;
        is_empty = !tokens_.read(state, position, scanner_state, token);
        if (!is_empty) look_at(token);
        entry = grammar_.entry(state, is_empty ? kEnd : token.symbol);
      }
      int reduced = kNone;
      bool has_reduced = false;
      for (uint8_t i = 0; i < entry.count; ++i) {
        const Action& action = entry.actions[i];
        if (action.type == kShift) {
          if (!action.shift.repetition) return shift(index, action, token);
        } else if (action.type == kReduce) {
          const int found = reduce(index, action, is_empty, entry.count == 1);
          has_reduced = true;
          if (found != kNone) reduced = found;
        } else {
          is_accepted_ = action.type == kAccept;
          if (!is_accepted_) versions_[index].status = kStuck;
          return;
        }
      }
      if (reduced != kNone) {
        --steps_left_;
        replace(index, reduced);
        state = versions_[index].top->state;
        if (is_empty) is_read = false;
        else entry = grammar_.entry(state, token.symbol);
      } else if (has_reduced) {
        versions_[index].status = kMerged;
        return;
      } else if (!is_empty && may_be_word(state, token, entry)) {
        token.symbol = grammar_.tables.keyword_capture_token;
      } else {
        versions_[index].status = kStuck;
        return;
      }
    }
  }

  void look_at(const Token& token) {
    furthest_ = std::max(furthest_, token.start);
    if (!limits_.left_out || versions_.size() > 1) return;
    if (lines_.mark(versions_[0].top, versions_[0].scanner_state, token.start))
      is_proven_ |= token.start > proof_.start && lines_.kept().back().indent <= proof_.indent;
  }

  // Whether a keyword that is not valid here can be a name; then `entry` is that of names.
  bool may_be_word(State state, const Token& token, Entry& entry) {
    const Symbol word = grammar_.tables.keyword_capture_token;
    if (!token.is_keyword || token.symbol == word || grammar_.is_reserved(state, token.symbol)) return false;
    entry = grammar_.entry(state, word);
    return entry.count > 0;
  }

  void shift(size_t index, const Action& action, const Token& token) {
    Version& version = versions_[index];
    const State next = action.shift.extra ? version.top->state : action.shift.state;
    version.top = stacks_.make(version.top, next, token.end, action.shift.extra);
    if (token.is_external) version.scanner_state = token.scanner_state;
  }

  // Pops `action`'s children off the stack and pushes its symbol, in one new version for each node below them; returns
  // the first new one that was not merged, or kNone. A single version with a single action is changed in place.
  int reduce(size_t index, const Action& action, bool ends_extra, bool is_only) {
    const Symbol symbol = action.reduce.symbol;
    const size_t num_paths = stacks_.collect(versions_[index].top, action.reduce.child_count);
    if (is_only && num_paths == 1 && versions_.size() == 1) {
      Node* top = push(stacks_.path(0), symbol, ends_extra);
      stacks_.release(versions_[0].top);
      versions_[0].top = top;
      return 0;
    }
    const size_t before = versions_.size();
    for (size_t i = 0; i < num_paths; ++i) {
      stacks_.is_overfull |= versions_.size() > 2 * kMostVersions;
      if (stacks_.is_overfull) return kNone;
      bool is_known = false;  // two paths to one node: two readings of the same children
      for (size_t j = 0; j < i && !is_known; ++j) is_known = stacks_.path(j).base == stacks_.path(i).base;
      if (is_known) continue;
      versions_.push_back({push(stacks_.path(i), symbol, ends_extra), versions_[index].scanner_state, kActive});
      for (size_t j = 0; j + 1 < versions_.size(); ++j)
        if (j != index && merge(j, versions_.size() - 1)) break;
    }
    return versions_.size() > before ? static_cast<int>(before) : kNone;
  }

  Node* push(const Path& path, Symbol symbol, bool ends_extra) {
    is_declined_ |= grammar_.is_function(symbol) && spans_more(path.base->position, path.end);
    const State state = path.base->state, next = grammar_.next_state(state, symbol);
    ++path.base->references;
    Node* top = stacks_.make(path.base, next, path.end, ends_extra && next == state);
    for (const uint32_t end : path.extras) top = stacks_.make(top, next, end, true);
    return top;
  }

  bool spans_more(uint32_t start, uint32_t end) {  // whether it spans more lines than a function may
    if (end - start < limits_.function_lines) return false;  // a line has at least one character
    if (line_ends_.empty()) {
      for (const uint8_t* at = text_; (at = std::find(at, text_ + size_, '\n')) != text_ + size_; ++at)
        line_ends_.push_back(static_cast<uint32_t>(at - text_));
      line_ends_.push_back(size_);
    }
    const auto first = std::lower_bound(line_ends_.begin(), line_ends_.end(), start);
    return 1 + (std::lower_bound(first, line_ends_.end(), end) - first) > limits_.function_lines;
  }

  // Replaces version `index` by version `by`.
  void replace(size_t index, size_t by) {
    if (by == index) return;
    stacks_.release(versions_[index].top);
    versions_[index] = versions_[by];
    versions_.erase(versions_.begin() + by);
  }

  // Merges version `second` into `first`, if they are at the same place in the same state.
  bool merge(size_t first, size_t second) {
    const Version &a = versions_[first], &b = versions_[second];
    if (a.status != kActive || b.status != kActive || a.top->state != b.top->state ||
        a.top->position != b.top->position || a.scanner_state != b.scanner_state)
      return false;
    stacks_.merge(a.top, *b.top);
    stacks_.release(b.top);
    versions_.erase(versions_.begin() + second);
    return true;
  }

  // Drops versions that have ended; none is left where the text is wrong.
  void condense() {
    for (size_t i = versions_.size(); i-- > 0;) {
      if (versions_[i].status == kActive) continue;
      stacks_.release(versions_[i].top);
      versions_.erase(versions_.begin() + i);
    }
    for (size_t i = 1; i < versions_.size(); ++i)
      for (size_t j = 0; j < i; ++j)
        if (merge(j, i)) {
          --i;
          break;
        }
    stacks_.is_overfull |= versions_.size() > kMostVersions;
  }

  // Skips lines around an error: from the nearest line before it that works, up to a line after it from which reading
  // succeeds to the next line that is indented no further. False where that would skip too much.
  bool recover() {
    if (furthest_ == size_) return false;  // something is missing at the end: no line to skip
    const uint32_t line = lines_.end_before(furthest_), before = left_out_;
    const bool was_open = may_be_open_;
    const std::vector<Line> known = lines_.kept();
    for (const Line& kept : known) ++kept.top->references;
    bool is_found = false;
    for (size_t i = known.size(); i-- > 0 && !is_found && !is_declined();) {
      uint32_t resume = line, indent = 0;
      for (int tries = 0; tries < kTries && !is_found && !is_declined(); ++tries) {
        while (lines_.next(resume, indent) && resume <= known[i].start) {}
        left_out_ = before + resume - known[i].start;
        if (resume == size_ || left_out_ > limits_.left_out) break;
        may_be_open_ = was_open || (limits_.open_end && closes(known[i].start, resume));
        lines_.keep(known, i + 1);
        resume_from(known[i], resume);
        proof_ = {resume, indent};
        run();
        is_found = is_accepted_ || is_proven_;
      }
    }
    for (const Line& kept : known) stacks_.release(kept.top);
    proof_ = kNoProof;
    return is_found && !is_accepted_;
  }

  // Whether there is a closing brace, or a directive such as #endif.
  bool closes(uint32_t start, uint32_t end) const {
    return std::any_of(text_ + start, text_ + end, [](uint8_t c) { return c == '}' || c == '#'; });
  }

  // Continues at `position` as if the text between `line` and it were not there.
  void resume_from(const Line& line, uint32_t position) {
    for (const Version& version : versions_) stacks_.release(version.top);
    versions_ = {{stacks_.copy(*line.top, position), line.scanner_state, kActive}};
    furthest_ = position;
  }

  Grammar& grammar_;
  Stacks& stacks_;
  Tokens tokens_;
  Lines lines_;
  const uint8_t* text_;
  uint32_t size_;
  Limits limits_;
  uint32_t left_out_ = 0;
  int64_t steps_left_;  // good texts take 0.3 (Java) to 1.1 (Scala) per byte, a few take 3
  std::vector<Version> versions_;
  Proof proof_ = kNoProof;
  uint32_t furthest_ = 0;  // where the furthest token read begins
  std::vector<uint32_t> line_ends_;  // computed on first use
  bool is_declined_ = false, is_accepted_ = false, is_proven_ = false, may_be_open_ = false;
};

// Reads texts in one language, one at a time, since they share its stacks and caches.
class Recognizer {
 public:
  Recognizer(const Tables* tables, const std::vector<std::string>& function_words) : grammar_(tables, function_words) {}

  // How many bytes were skipped so that the rest has no syntax error, including those after the last line of a text
  // with an open end; -1 where that is not possible within `limits`.
  int64_t left_out(const uint8_t* text, uint32_t size, const Limits& limits) {
    return Reading(grammar_, stacks_, text, size, limits).left_out();
  }

 private:
  Grammar grammar_;
  Stacks stacks_;
};

}  // namespace megacoder::grammar
