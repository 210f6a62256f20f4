// Recognizes Python's expressions in a sequence of token kinds: those of 3.11's grammar, all of which are valid in
// later versions too. No tree is built and no expression is read twice: a Form says what an expression may still turn
// out to be.
//
// The precedence of binary operators does not affect whether a sequence of operands and operators is valid; so an
// operation is read as a flat run, and only parentheses, lambdas and the like nest. Their depth is limited far below
// what CPython's parser supports; a level is counted about as CPython counts it.
#pragma once

#include "python_kinds.h"

namespace megacoder::python {

// What an expression can be used as; zero where there is no expression, or not surely one.
enum Form : uint8_t {
  kAbsent = 0,
  kPlain = 1,
  kSingle = 2,      // a name, an attribute or a subscript: the target of `+=` and of `: int`
  kDeletable = 4,   // by `del`: a single one, or a tuple or list of them
  kAssignable = 8,  // a deletable one, or one with starred targets in it
  kTarget = kPlain | kSingle | kDeletable | kAssignable,
  kTargets = kPlain | kDeletable | kAssignable,
};

class Expressions {
 protected:
  explicit Expressions(const Kind* tokens) : at_(tokens) {}

  // Counts nesting in levels of CPython's parser; the scope's end restores the count.
  class Depth {
   public:
    explicit Depth(int& depth) : depth_(depth), before_(depth) {}
    ~Depth() { depth_ = before_; }
    bool add(int levels) { return (depth_ += levels) <= 2000; }  // CPython allows 4000 to 6000
    void reset() { depth_ = before_; }

   private:
    int& depth_;
    const int before_;
  };

  bool take(Kind kind) { return *at_ == kind && (++at_, true); }
  bool take_name() { return is_name(*at_) && (++at_, true); }
  bool begins() const { return kKindTable.begins[*at_]; }
  bool begins_comprehension() const { return *at_ == kFor || (*at_ == kAsync && at_[1] == kFor); }

  // star_expressions: with commas, some perhaps starred.
  Form expressions() {
    const bool starred = *at_ == kStar;
    Form form = element(false);
    if (*at_ != kComma) return starred ? kAbsent : form;  // a starred one alone is refused by CPython's compiler
    while (form && take(kComma) && begins()) form = both(form, element(false));
    return without_single(form);
  }

  Form yield_or_expressions() {
    if (!take(kYield)) return expressions();
    if (take(kFrom)) return plain(expression());
    return !begins() || expressions() ? kPlain : kAbsent;
  }

  // named_expression
  Form named() {
    if (is_name(*at_) && at_[1] == kWalrus) {
      at_ += 2;
      return plain(expression());
    }
    return expression();
  }

  Form expression() {
    if (*at_ == kLambda) return lambda();
    const Form form = operation();
    if (*at_ != kIf || !form) return form;
    for (Depth depth(depth_); take(kIf);) {
      if (!depth.add(5) || !operation() || !take(kElse)) return kAbsent;
      if (*at_ == kLambda) return lambda();
      if (!operation()) return kAbsent;
    }
    return kPlain;
  }

  // star_targets, as before `in`
  bool targets() {
    const bool starred = *at_ == kStar;
    if (!target()) return false;
    if (*at_ != kComma) return !starred;
    while (take(kComma) && begins()) {
      if (!target()) return false;
    }
    return true;
  }

  // Parameters up to `end`, which is not consumed; those of a lambda have no annotations.
  bool parameters(Kind end) {
    const bool annotated = end == kCloseParenthesis;
    bool any = false, slash = false, star = false, defaults = false;
    while (*at_ != end) {
      if (take(kDoubleStar)) {
        if (!parameter(annotated)) return false;
        take(kComma);
        return *at_ == end;
      }
      if (take(kSlash)) {
        if (!any || slash || star) return false;
        slash = true;
      } else if (take(kStar)) {
        if (star || !(*at_ == kComma ? is_name(at_[1]) : parameter(annotated))) return false;
        star = true;
      } else {
        if (!parameter(annotated)) return false;
        if (take(kAssign)) {
          if (!expression()) return false;
          defaults = true;
        } else if (defaults && !star) {
          return false;
        }
        any = true;
      }
      if (!take(kComma)) return *at_ == end;
    }
    return true;
  }

  // After the opening parenthesis. A generator without its own parentheses must be the only argument, and of a call.
  bool arguments(bool call) {
    bool keyword = false, mapping = false;
    for (bool first = true; *at_ != kCloseParenthesis; first = false) {
      if (take(kDoubleStar)) {
        mapping = true;
        if (!expression()) return false;
      } else if (take(kStar)) {
        if (mapping || !expression()) return false;
      } else if (is_name(*at_) && at_[1] == kAssign) {
        at_ += 2;
        keyword = true;
        if (!expression()) return false;
      } else {
        if (keyword || mapping || !named()) return false;
        if (call && first && begins_comprehension()) return comprehension(kCloseParenthesis);
      }
      if (!take(kComma)) break;
    }
    return take(kCloseParenthesis);
  }

  // disjunction; or bitwise_or, where it is not `logical`
  Form operation(bool logical = true) {
    const int joins = logical ? kArithmetic | kPower | kCompares | kConnects : kArithmetic | kPower;
    Depth depth(depth_);
    bool single = true, negatable = logical;
    for (;; single = false) {
      while (negatable && *at_ == kNot) {
        ++at_;
        single = false;
        if (!depth.add(4)) return kAbsent;
      }
      while (*at_ == kMinus || *at_ == kPlus || *at_ == kTilde) {
        ++at_;
        single = false;
        if (!depth.add(4)) return kAbsent;
      }
      if (take(kAwait)) single = false;
      const Form form = primary();
      if (!form) return kAbsent;
      const Joins join = kKindTable.joins[*at_];
      if (!(join & joins)) return single ? form : kPlain;
      negatable = join == kConnects;
      if (join == kPower) {
        if (!depth.add(4)) return kAbsent;
      } else {
        depth.reset();
      }
      if (*at_ == kNot && at_[1] == kIn) ++at_;
      else if (*at_ == kNot) return kAbsent;
      else if (*at_ == kIs && at_[1] == kNot) ++at_;
      ++at_;
    }
  }

  // strings: adjacent ones are concatenated; all are bytes or none.
  bool strings() {
    if (*at_ == kBytes) {
      while (*at_ == kBytes) ++at_;
      return *at_ != kText && *at_ != kFormat;
    }
    for (;;) {
      if (*at_ == kFormat) {
        if (!format()) return false;
      } else if (!take(kText)) {
        return *at_ != kBytes;
      }
    }
  }

  static Form plain(Form form) { return form ? kPlain : kAbsent; }
  static Form both(Form a, Form b) { return a && b ? static_cast<Form>(a & b) : kAbsent; }
  static Form without_single(Form form) { return static_cast<Form>(form & ~kSingle); }

  const Kind* at_;
  int depth_ = 0;

 private:
  static constexpr int kBracketLevels = 40;

  // An element of a tuple, list or set: an expression, or a starred operation. Only in brackets may it be a walrus.
  Form element(bool in_brackets) {
    if (take(kStar)) return static_cast<Form>(operation(false) & (kPlain | kAssignable));
    return in_brackets ? named() : expression();
  }

  bool target() {
    take(kStar);
    return operation(false) & kAssignable;
  }

  bool parameter(bool annotated) { return take_name() && (!annotated || !take(kColon) || expression()); }

  Form lambda() {
    Depth depth(depth_);
    ++at_;
    if (!depth.add(kBracketLevels) || !parameters(kColon)) return kAbsent;
    ++at_;
    return plain(expression());
  }

  // An atom with its attributes, calls and subscripts.
  Form primary() {
    Form form = atom();
    while (form) {
      if (take(kDot)) {
        form = take_name() ? kTarget : kAbsent;
      } else if (*at_ == kOpenParenthesis) {
        Depth depth(depth_);
        ++at_;
        form = depth.add(kBracketLevels) && arguments(true) ? kPlain : kAbsent;
      } else if (*at_ == kOpenBracket) {
        Depth depth(depth_);
        ++at_;
        form = depth.add(kBracketLevels) && slices() ? kTarget : kAbsent;
      } else {
        break;
      }
    }
    return form;
  }

  Form atom() {
    switch (*at_) {
      case kName: case kUnderscore: case kMatch: case kCase:
        ++at_;
        return kTarget;
      case kNumber: case kNone: case kTrue: case kFalse: case kEllipsis:
        ++at_;
        return kPlain;
      case kText: case kBytes: case kFormat:
        return strings() ? kPlain : kAbsent;
      case kOpenParenthesis: case kOpenBracket: case kOpenBrace: {
        Depth depth(depth_);
        if (!depth.add(kBracketLevels)) return kAbsent;
        const Kind kind = *at_++;
        if (kind == kOpenParenthesis) return parenthesised();
        if (kind == kOpenBracket) return list();
        return braces() ? kPlain : kAbsent;
      }
      default:
        return kAbsent;
    }
  }

  // After the parenthesis: a tuple, a group or a generator.
  Form parenthesised() {
    if (take(kCloseParenthesis)) return kTargets;
    if (*at_ == kYield) return yield_or_expressions() && take(kCloseParenthesis) ? kPlain : kAbsent;
    const bool starred = *at_ == kStar;
    Form form = element(true);
    if (!form) return kAbsent;
    if (*at_ == kComma) return rest(without_single(form), kCloseParenthesis);
    if (starred) return kAbsent;
    if (begins_comprehension()) return comprehension(kCloseParenthesis) ? kPlain : kAbsent;
    return take(kCloseParenthesis) ? form : kAbsent;
  }

  Form list() {
    if (take(kCloseBracket)) return kTargets;
    const bool starred = *at_ == kStar;
    const Form form = element(true);
    if (form && !starred && begins_comprehension()) return comprehension(kCloseBracket) ? kPlain : kAbsent;
    return rest(without_single(form), kCloseBracket);
  }

  // The elements of a tuple, a list or a set after the first one, and what closes it.
  Form rest(Form form, Kind close) {
    while (form && take(kComma) && *at_ != close) form = both(form, element(true));
    return take(close) ? form : kAbsent;
  }

  // After the brace: a set or a dict.
  bool braces() {
    if (take(kCloseBrace)) return true;
    const bool starred = *at_ == kStar, walrus = is_name(*at_) && at_[1] == kWalrus;
    if (*at_ != kDoubleStar) {
      if (!element(true)) return false;
      if (starred || walrus || *at_ != kColon) {
        if (!starred && begins_comprehension()) return comprehension(kCloseBrace);
        return rest(kPlain, kCloseBrace);
      }
      ++at_;
      if (!expression()) return false;
      if (begins_comprehension()) return comprehension(kCloseBrace);
    } else if (!mapping()) {
      return false;
    }
    while (take(kComma) && *at_ != kCloseBrace) {
      if (*at_ == kDoubleStar ? !mapping() : !(expression() && take(kColon) && expression())) return false;
    }
    return take(kCloseBrace);
  }

  bool mapping() { return take(kDoubleStar) && operation(false); }

  // for_if_clauses, and what closes them.
  bool comprehension(Kind close) {
    while (begins_comprehension()) {
      take(kAsync);
      ++at_;
      if (!targets() || !take(kIn) || !operation()) return false;
      while (take(kIf)) {
        if (!operation()) return false;
      }
    }
    return take(close);
  }

  bool slices() {
    do {
      if (take(kStar) ? !expression() : !slice()) return false;
    } while (take(kComma) && *at_ != kCloseBracket);
    return take(kCloseBracket);
  }

  bool slice() {
    if (*at_ != kColon) {
      const bool walrus = is_name(*at_) && at_[1] == kWalrus;
      if (!named()) return false;
      if (walrus || *at_ != kColon) return true;
    }
    for (int colons = 0; colons < 2 && take(kColon); ++colons) {
      if (*at_ != kColon && *at_ != kComma && *at_ != kCloseBracket && !expression()) return false;
    }
    return true;
  }

  bool format() {
    Depth depth(depth_);
    if (!depth.add(kBracketLevels)) return false;
    for (++at_; take(kField);) {
      if (!yield_or_expressions() || !take(kFieldEnd)) return false;
    }
    return take(kFormatEnd);
  }
};

}  // namespace megacoder::python
