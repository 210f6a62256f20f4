// Python source to the kinds of its tokens, as CPython's tokenizer splits it, from 3.11 on. Anything that versions read
// differently, or that is rare and hard to get right (names beyond ASCII, \N{...} in strings), is declined.
//
// F-strings are the hard part: 3.11 finds the end of the string first and then looks inside, so that a field may
// contain no backslash, no comment and no quote of the string's own kind; 3.12 tokenizes fields with the rest of the
// file. Only what both read the same way is accepted.
#pragma once

#include <cstring>
#include <memory>

#include "python_kinds.h"

namespace megacoder::python {

// What a byte can be in a file, and where a scan for the end of a string or a name stops.
enum ByteClass : uint8_t { kBegins = 1, kDigit = 2, kHex = 4, kStops = 8, kBrace = 16, kBeyond = 32, kBlank = 64 };

struct ByteTable {
  uint8_t classes[256] = {};

  constexpr ByteTable() {
    for (int c = 'a'; c <= 'z'; ++c) classes[c] = classes[c - 'a' + 'A'] = kBegins;
    classes[static_cast<int>('_')] = kBegins;
    for (int c = '0'; c <= '9'; ++c) classes[c] = kDigit | kHex;
    for (int c = 'a'; c <= 'f'; ++c) classes[c] = classes[c - 'a' + 'A'] = kBegins | kHex;
    for (const int c : {'\0', '\n', '\\', '\'', '"'}) classes[c] = kStops;
    for (const int c : {'{', '}'}) classes[c] = kBrace;
    for (const int c : {' ', '\t', '\f'}) classes[c] = kBlank;
    for (int c = 128; c < 256; ++c) classes[c] = kBeyond;
  }
};

inline constexpr ByteTable kBytesOf;

inline bool is(char c, int classes) { return kBytesOf.classes[static_cast<uint8_t>(c)] & classes; }

class Tokens {
 public:
  // `text` ends in a zero byte, and contains no other one and no carriage return.
  Tokens(const char* text, int64_t size)
      : at_(text), kinds_(new Kind[2 * size + 2]), out_(kinds_.get()) {}

  // The tokens, kEnd last; null where the text is declined.
  const Kind* cut() {
    while (*at_) {
      if (!line()) return nullptr;
    }
    while (--num_indents_) *out_++ = kDedent;
    *out_ = kEnd;
    return kinds_.get();
  }

 private:
  static constexpr int kMaxIndents = 90, kMaxBrackets = 100, kMaxFormats = 3;  // CPython: 100, 200, many
  static constexpr int64_t kMaxDigits = 4000;                                   // 4300

  // A logical line, with the indentation before it; or a blank one, which produces no token.
  bool line() {
    int column = 0, narrow = 0;  // with tabs to multiples of eight, and with tabs of width one
    for (;; ++at_) {
      if (*at_ == ' ') ++column, ++narrow;
      else if (*at_ == '\t') column = column / 8 * 8 + 8, ++narrow;
      else if (*at_ == '\f') column = narrow = 0;
      else break;
    }
    if (*at_ == '#') skip_comment();
    if (*at_ == '\n') return ++at_, true;
    if (*at_ == '\0') return true;
    if (*at_ == '\\' || !indent(column, narrow)) return false;
    for (;;) {
      if (is(*at_, kBlank)) {
        ++at_;
      } else if (*at_ == '#') {
        skip_comment();
      } else if (*at_ == '\n' || *at_ == '\0') {
        if (!num_brackets_) {
          *out_++ = kNewline;
          at_ += *at_ == '\n';
          return true;
        }
        if (*at_++ == '\0') return false;
      } else if (*at_ == '\\') {
        if (at_[1] != '\n' || at_[2] == '\0') return false;
        at_ += 2;
      } else if (!token()) {
        return false;
      }
    }
  }

  void skip_comment() {
    while (*at_ != '\n' && *at_ != '\0') ++at_;
  }

  bool indent(int column, int narrow) {
    const Indent& now = indents_[num_indents_ - 1];
    if (column > now.column) {
      if (narrow <= now.narrow || num_indents_ == kMaxIndents) return false;
      indents_[num_indents_++] = {column, narrow};
      *out_++ = kIndent;
      return true;
    }
    while (column < indents_[num_indents_ - 1].column) {
      --num_indents_;
      *out_++ = kDedent;
    }
    return column == indents_[num_indents_ - 1].column && narrow == indents_[num_indents_ - 1].narrow;
  }

  // A token other than a blank or the end of a line.
  bool token() {
    if (is(*at_, kBegins)) return word();
    if (is(*at_, kDigit) || (*at_ == '.' && is(at_[1], kDigit))) return number();
    if (*at_ == '"' || *at_ == '\'') return string(false, false, false);
    return mark();
  }

  bool word() {
    const char* start = at_;
    uint64_t letters = 0;
    for (; is(*at_, kBegins | kDigit); ++at_) letters = letters << 8 | static_cast<uint8_t>(*at_);
    if (is(*at_, kBeyond)) return false;
    const int64_t size = at_ - start;
    if ((*at_ == '"' || *at_ == '\'') && size <= 2) {
      const uint64_t prefix = letters | (size == 2 ? 0x2020 : 0x20);  // in lower case
      switch (prefix) {
        case 'r': return string(true, false, false);
        case 'u': return string(false, false, false);
        case 'b': return string(false, true, false);
        case 'f': return string(false, false, true);
        case 'b' << 8 | 'r': case 'r' << 8 | 'b': return string(true, true, false);
        case 'f' << 8 | 'r': case 'r' << 8 | 'f': return string(true, false, true);
      }
    }
    Kind kind = size <= 8 ? kKeywords.kind_of(letters) : kName;
    if (size == 9 && !std::memcmp(start, "__debug__", 9)) kind = kTrue;  // like True it cannot be assigned to
    *out_++ = kind;
    return size != 14 || std::memcmp(start, "barry_as_FLUFL", 14);  // importing it makes `!=` an error
  }

  bool number() {
    const char* start = at_;
    *out_++ = kNumber;
    if (*at_ == '0' && is(at_[1], kBegins)) {
      const char base = at_[1] | 0x20;
      if (base == 'x' || base == 'o' || base == 'b') {
        at_ += at_[2] == '_' ? 3 : 2;
        if (!digits(base)) return false;
        return !is(*at_, kBegins | kDigit | kBeyond);
      }
    }
    if (*at_ != '.') {
      if (!digits('d')) return false;
      if (*start == '0') {  // only zeros are accepted; 012.5 is a number too, but rare
        for (const char* c = start; c < at_; ++c) {
          if (*c != '0' && *c != '_') return false;
        }
      }
      if (at_ - start > kMaxDigits) return false;
    }
    if (*at_ == '.') {
      ++at_;
      if (is(*at_, kDigit) && !digits('d')) return false;
    }
    if (*at_ == 'e' || *at_ == 'E') {
      at_ += at_[1] == '+' || at_[1] == '-' ? 2 : 1;
      if (!digits('d')) return false;
    }
    if (*at_ == 'j' || *at_ == 'J') ++at_;
    return !is(*at_, kBegins | kDigit | kBeyond);
  }

  // At least one digit of a base, with single underscores between digits.
  bool digits(char base) {
    const auto fits = [base](char c) {
      if (base == 'x') return is(c, kHex);
      return '0' <= c && c <= (base == 'o' ? '7' : base == 'b' ? '1' : '9');
    };
    for (;;) {
      if (!fits(*at_)) return false;
      while (fits(*at_)) ++at_;
      if (*at_ != '_') return true;
      ++at_;
    }
  }

  bool string(bool raw, bool bytes, bool format) {
    const char quote = *at_;
    const bool triple = at_[1] == quote && at_[2] == quote;
    if (num_formats_ && triple) return false;
    at_ += triple ? 3 : 1;
    *out_++ = bytes ? kBytes : format ? kFormat : kText;
    if (format && ++num_formats_ > kMaxFormats) return false;
    const int stops = kStops | (bytes ? kBeyond : 0) | (format ? kBrace : 0);
    for (;;) {
      while (!is(*at_, stops)) ++at_;
      if (*at_ == quote) {
        if (!triple || (at_[1] == quote && at_[2] == quote)) break;
        ++at_;
      } else if (*at_ == '"' || *at_ == '\'') {
        ++at_;
      } else if (*at_ == '\n') {
        if (!triple) return false;
        ++at_;
      } else if (*at_ == '\\') {
        if (!escape(raw, bytes, format)) return false;
      } else if (format && (*at_ == '{' || *at_ == '}')) {
        const char* start = at_;
        if (at_[1] == *at_) at_ += 2;
        else if (*at_ == '}' || !field(true, triple) || holds_end(start, quote, triple)) return false;
      } else {  // the end of the file, or a byte beyond ASCII where none is allowed
        return false;
      }
    }
    at_ += triple ? 3 : 1;
    if (format) {
      *out_++ = kFormatEnd;
      --num_formats_;
    }
    return true;
  }

  // At a backslash in a string: skips it and what it escapes.
  bool escape(bool raw, bool bytes, bool format) {
    if (num_formats_ > format) return false;  // 3.11 allows none in a field
    const char c = at_[1];
    if (c == '\0') return false;
    if (format && (c == '{' || c == '}')) return ++at_, raw;
    at_ += 2;
    if (raw) return true;
    if (c == 'x') return hex_digits(2);
    if (bytes) return true;
    if (c == 'u') return hex_digits(4);
    if (c == 'U') return at_[0] == '0' && at_[1] == '0' && (at_[2] == '0' || (at_[2] == '1' && at_[3] == '0')) && hex_digits(8);
    return c != 'N';
  }

  bool hex_digits(int count) {
    for (; count; --count, ++at_) {
      if (!is(*at_, kHex)) return false;
    }
    return true;
  }

  // A field of an f-string, from brace to brace. Only an outer field may have fields in its format specification. In a
  // triple-quoted string a field may span lines.
  bool field(bool outer, bool lines) {
    *out_++ = kField;
    ++at_;
    if (!open('f')) return false;
    const int level = num_brackets_;
    for (;;) {
      while (*at_ == ' ' || *at_ == '\t' || (*at_ == '\n' && lines)) ++at_;
      if (num_brackets_ == level) {
        if (*at_ == '}' || *at_ == ':' || (*at_ == '!' && at_[1] != '=')) break;
        if (*at_ == '=' && at_[1] != '=' && outer) {  // 3.12.1 fails on an inner one
          do ++at_;
          while (*at_ == ' ' || *at_ == '\t');
          break;
        }
      }
      if (*at_ == '#' || *at_ == '\\' || *at_ == '\n' || *at_ == '\0' || !token()) return false;
    }
    *out_++ = kFieldEnd;
    close('f');
    if (*at_ == '!') {
      if (at_[1] != 's' && at_[1] != 'r' && at_[1] != 'a') return false;
      at_ += 2;
    }
    if (*at_ == ':') {
      for (++at_; *at_ != '}';) {
        if (is(*at_, kStops)) return false;
        if (*at_ != '{') ++at_;
        else if (!outer || at_[1] == '{' || !field(false, false)) return false;
      }
    }
    return *at_++ == '}';
  }

  // Whether 3.11 would have found the end of an f-string inside the field that was just read.
  bool holds_end(const char* start, char quote, bool triple) const {
    for (; start < at_; ++start) {
      if (*start == quote && (!triple || (start[1] == quote && start[2] == quote))) return true;
    }
    return false;
  }

  bool open(char bracket) {
    if (num_brackets_ == kMaxBrackets) return false;
    brackets_[num_brackets_++] = bracket;
    return true;
  }

  bool close(char bracket) { return num_brackets_ && brackets_[--num_brackets_] == bracket; }

  bool mark() {
    const char c = *at_++;
    const bool assigns = *at_ == '=';
    switch (c) {
      case '(': *out_++ = kOpenParenthesis; return open(c);
      case '[': *out_++ = kOpenBracket; return open(c);
      case '{': *out_++ = kOpenBrace; return open(c);
      case ')': *out_++ = kCloseParenthesis; return close('(');
      case ']': *out_++ = kCloseBracket; return close('[');
      case '}': *out_++ = kCloseBrace; return close('{');
      case ',': *out_++ = kComma; return true;
      case ';': *out_++ = kSemicolon; return true;
      case '~': *out_++ = kTilde; return true;
      case ':': return put(assigns ? kWalrus : kColon, assigns);
      case '.': return at_[0] == '.' && at_[1] == '.' ? put(kEllipsis, 2) : put(kDot, 0);
      case '=': return put(assigns ? kComparison : kAssign, assigns);
      case '!': return assigns && put(kComparison, 1);
      case '-':
        if (*at_ == '>') return put(kArrow, 1);
        return put(assigns ? kAugmentedAssign : kMinus, assigns);
      case '+': return put(assigns ? kAugmentedAssign : kPlus, assigns);
      case '@': return put(assigns ? kAugmentedAssign : kAt, assigns);
      case '|': return put(assigns ? kAugmentedAssign : kBar, assigns);
      case '%': case '&': case '^': return put(assigns ? kAugmentedAssign : kOperator, assigns);
      case '*': return repeated(c, kStar, kDoubleStar);
      case '/': return repeated(c, kSlash, kOperator);
      case '<':
        if (*at_ == '>') return false;
        [[fallthrough]];
      case '>':
        if (assigns) return put(kComparison, 1);
        return *at_ == c ? repeated(c, kOperator, kOperator) : put(kComparison, 0);
      default: return false;
    }
  }

  // An operator of one character or of that character twice, perhaps followed by `=`.
  bool repeated(char c, Kind once, Kind twice) {
    const int more = *at_ == c;
    const bool assigns = at_[more] == '=';
    return put(assigns ? kAugmentedAssign : more ? twice : once, more + assigns);
  }

  bool put(Kind kind, int more) {
    *out_++ = kind;
    at_ += more;
    return true;
  }

  struct Indent {
    int column, narrow;
  };

  const char* at_;
  std::unique_ptr<Kind[]> kinds_;  // at most one token per byte, plus dedents, the last newline and the end
  Kind* out_;
  Indent indents_[kMaxIndents] = {};
  int num_indents_ = 1;
  char brackets_[kMaxBrackets];  // open ones; 'f' is a field
  int num_brackets_ = 0;
  int num_formats_ = 0;  // f-strings that are open
};

}  // namespace megacoder::python
