// Whether a text is certainly Python: a recognizer of 3.11's statements, on top of python_expressions.h.
//
// Whatever it accepts, the parser of CPython 3.11 and of every later version accepts. What it does not accept may still
// be Python: then CPython is asked. Errors that the parser does not find (a `return` outside a function, a repeated
// parameter name) are not checked.
#pragma once

#include <cstring>
#include <string>

#include "python_expressions.h"
#include "python_tokens.h"

namespace megacoder::python {

class Statements : private Expressions {
 public:
  explicit Statements(const Kind* tokens) : Expressions(tokens) {}

  bool file() { return statements() && *at_ == kEnd; }

 private:
  static constexpr int kStatementLevels = 15;

  bool statements() {
    while (*at_ != kDedent && *at_ != kEnd) {
      if (!statement()) return false;
    }
    return true;
  }

  // What follows the header of a compound statement.
  bool block() {
    if (!take(kColon)) return false;
    if (!take(kNewline)) return simple_statements();
    Depth depth(depth_);
    return depth.add(kStatementLevels) && take(kIndent) && statements() && take(kDedent);
  }

  bool statement() {
    switch (*at_) {
      case kIf: return if_statement();
      case kDef: return function();
      case kClass: return class_statement();
      case kAt: return decorated();
      case kFor: return for_statement();
      case kWhile: return ++at_, named() && block() && otherwise();
      case kWith: return with();
      case kTry: return try_statement();
      case kAsync:
        ++at_;
        return *at_ == kDef ? function() : *at_ == kFor ? for_statement() : *at_ == kWith && with();
      case kMatch: {
        const Kind* const start = at_;
        ++at_;
        // A `match` statement only if all of this follows; otherwise `match` is a name like any other.
        if (begins() && expressions_to_match() && take(kColon) && take(kNewline) && take(kIndent) && *at_ == kCase)
          return cases();
        at_ = start;
        return simple_statements();
      }
      default: return simple_statements();
    }
  }

  bool simple_statements() {
    for (;;) {
      if (!simple_statement()) return false;
      if (take(kNewline)) return true;
      if (!take(kSemicolon)) return false;
      if (take(kNewline)) return true;
    }
  }

  bool simple_statement() {
    switch (*at_) {
      case kPass: case kBreak: case kContinue: return ++at_, true;
      case kReturn: return ++at_, !begins() || expressions();
      case kRaise: return ++at_, !begins() || (expression() && (!take(kFrom) || expression()));
      case kAssert: return ++at_, expression() && (!take(kComma) || expression());
      case kGlobal: case kNonlocal:
        do ++at_;
        while (take_name() && *at_ == kComma);
        return is_name(at_[-1]);
      case kDel: return ++at_, expressions() & kDeletable;
      case kImport: return import();
      case kFrom: return from();
      default: return expression_statement();
    }
  }

  // An expression or an assignment.
  bool expression_statement() {
    if (*at_ == kYield) return yield_or_expressions();
    const bool parenthesised = *at_ == kOpenParenthesis;
    Form form = expressions();
    // `(a): int` is valid, `(a).b: int` is not: both are declined.
    if (take(kColon)) return form & kSingle && !parenthesised && expression() && (!take(kAssign) || yield_or_expressions());
    if (take(kAugmentedAssign)) return form & kSingle && yield_or_expressions();
    while (take(kAssign)) {
      if (!(form & kAssignable)) return false;
      if (*at_ == kYield) return yield_or_expressions();
      form = expressions();
    }
    return form;
  }

  bool import() {
    do {
      ++at_;
      if (!dotted_name() || (take(kAs) && !take_name())) return false;
    } while (*at_ == kComma);
    return true;
  }

  bool from() {
    ++at_;
    bool relative = false;
    while (take(kDot) || take(kEllipsis)) relative = true;
    if (!(relative && *at_ == kImport) && !dotted_name()) return false;
    if (!take(kImport)) return false;
    if (take(kStar)) return true;
    const bool parenthesised = take(kOpenParenthesis);
    do {
      if (!take_name() || (take(kAs) && !take_name())) return false;
    } while (take(kComma) && !(parenthesised && *at_ == kCloseParenthesis));
    return !parenthesised || take(kCloseParenthesis);
  }

  bool dotted_name() {
    do {
      if (!take_name()) return false;
    } while (take(kDot));
    return true;
  }

  bool if_statement() {
    Depth depth(depth_);  // CPython's parser nests an `elif` in the one before it
    do {
      ++at_;
      if (!depth.add(2) || !named() || !block()) return false;
    } while (*at_ == kElif);
    return otherwise();
  }

  bool otherwise() { return !take(kElse) || block(); }

  bool for_statement() { return ++at_, targets() && take(kIn) && expressions() && block() && otherwise(); }

  bool with() {
    ++at_;
    const Kind* const start = at_;
    if (take(kOpenParenthesis)) {  // around all items, or else part of the first one
      if (with_items(true) && take(kCloseParenthesis) && *at_ == kColon) return block();
      at_ = start;
    }
    return with_items(false) && block();
  }

  bool with_items(bool parenthesised) {
    do {
      if (!expression() || (take(kAs) && !(operation(false) & kAssignable))) return false;
    } while (take(kComma) && !(parenthesised && *at_ == kCloseParenthesis));
    return true;
  }

  bool try_statement() {
    ++at_;
    if (!block()) return false;
    if (*at_ != kExcept) return take(kFinally) && block();
    const bool starred = at_[1] == kStar;
    while (take(kExcept)) {
      if (take(kStar) != starred) return false;
      const bool all = *at_ == kColon && !starred;
      if (!all && (!expression() || (take(kAs) && !take_name()))) return false;
      if (!block()) return false;
      if (all && *at_ == kExcept) return false;
    }
    return otherwise() && (!take(kFinally) || block());
  }

  bool decorated() {
    while (take(kAt)) {
      if (!named() || !take(kNewline)) return false;
    }
    if (*at_ == kClass) return class_statement();
    take(kAsync);
    return *at_ == kDef && function();
  }

  bool class_statement() {
    ++at_;
    return take_name() && (!take(kOpenParenthesis) || arguments(false)) && block();
  }

  bool function() {
    ++at_;
    if (!take_name() || !take(kOpenParenthesis) || !parameters(kCloseParenthesis)) return false;
    ++at_;
    return (!take(kArrow) || expression()) && block();
  }

  // The subject of a `match`: with a comma a tuple, whose elements may be starred; alone it may be a walrus.
  bool expressions_to_match() { return is_name(*at_) && at_[1] == kWalrus ? named() : expressions(); }

  bool cases() {
    Depth depth(depth_);
    if (!depth.add(kStatementLevels)) return false;
    while (take(kCase)) {
      if (!patterns() || (take(kIf) && !named()) || !block()) return false;
    }
    return take(kDedent);
  }

  bool patterns() {
    const bool starred = *at_ == kStar;
    if (!maybe_starred()) return false;
    if (*at_ != kComma) return !starred;
    while (take(kComma) && *at_ != kColon && *at_ != kIf) {
      if (!maybe_starred()) return false;
    }
    return true;
  }

  bool maybe_starred() { return take(kStar) ? take_name() : pattern(); }

  bool pattern() {
    Depth depth(depth_);
    if (!depth.add(kStatementLevels)) return false;
    do {
      if (!closed_pattern()) return false;
    } while (take(kBar));
    return !take(kAs) || take_capture();
  }

  bool take_capture() { return *at_ != kUnderscore && take_name(); }

  bool closed_pattern() {
    switch (*at_) {
      case kUnderscore: return ++at_, true;
      case kName: case kMatch: case kCase:
        return dotted_name() && (!take(kOpenParenthesis) || class_patterns());
      case kOpenParenthesis: case kOpenBracket: return sequence_pattern();
      case kOpenBrace: return ++at_, mapping_pattern();
      default: return literal();
    }
  }

  // Without complex numbers and f-strings.
  bool literal() {
    switch (*at_) {
      case kMinus: return *++at_ == kNumber && (++at_, true);
      case kNumber: case kNone: case kTrue: case kFalse: return ++at_, true;
      case kText: case kBytes:
        for (const Kind kind = *at_; take(kind);) {}  // what follows one of another kind takes no string
        return true;
      default: return false;
    }
  }

  bool sequence_pattern() {
    const bool list = *at_++ == kOpenBracket, starred = *at_ == kStar;
    const Kind close = list ? kCloseBracket : kCloseParenthesis;
    if (take(close)) return true;
    if (!maybe_starred()) return false;
    if (take(close)) return list || !starred;
    while (take(kComma) && *at_ != close) {
      if (!maybe_starred()) return false;
    }
    return take(close);
  }

  bool mapping_pattern() {
    while (*at_ != kCloseBrace) {
      if (take(kDoubleStar)) {
        if (!take_capture()) return false;
        take(kComma);
        break;
      }
      const bool value = is_name(*at_) && at_[1] == kDot;
      if (!(value ? dotted_name() : literal()) || !take(kColon) || !pattern()) return false;
      if (!take(kComma)) break;
    }
    return take(kCloseBrace);
  }

  bool class_patterns() {
    for (bool keywords = false; *at_ != kCloseParenthesis;) {
      if (is_name(*at_) && *at_ != kUnderscore && at_[1] == kAssign) {  // as a positional pattern, _ is a wildcard
        at_ += 2;
        keywords = true;
      } else if (keywords) {
        return false;
      }
      if (!pattern()) return false;
      if (!take(kComma)) break;
    }
    return take(kCloseParenthesis);
  }
};

}  // namespace megacoder::python

namespace megacoder {

// `text` is UTF-8, followed by a zero byte.
inline bool surely_python(const char* text, int64_t size) {
  if (size > INT32_MAX / 4 || std::memchr(text, 0, size)) return false;
  std::string lines;
  if (std::memchr(text, '\r', size)) {  // a CRLF is a newline, also in strings; a lone CR is left to CPython
    lines.reserve(size);
    for (const char* at = text; at < text + size; ++at) {
      if (*at != '\r') lines += *at;
      else if (at[1] != '\n') return false;
    }
    text = lines.c_str();
    size = static_cast<int64_t>(lines.size());
  }
  python::Tokens tokens(text, size);
  const python::Kind* kinds = tokens.cut();
  return kinds && python::Statements(kinds).file();
}

}  // namespace megacoder
