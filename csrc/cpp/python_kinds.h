// The kinds of Python's tokens, and what the recognizer needs to know about a kind. A token is just its kind: one byte.
#pragma once

#include <cstdint>

namespace megacoder::python {

enum Kind : uint8_t {
  kEnd,
  kNewline, kIndent, kDedent,

  // Names, including the soft keywords.
  kName, kUnderscore, kMatch, kCase,

  // Keywords. (`match` and `case` are above; 3.12's `type` statement is not accepted.)
  kFalse, kNone, kTrue, kAnd, kAs, kAssert, kAsync, kAwait, kBreak, kClass, kContinue, kDef, kDel, kElif, kElse,
  kExcept, kFinally, kFor, kFrom, kGlobal, kIf, kImport, kIn, kIs, kLambda, kNonlocal, kNot, kOr, kPass, kRaise,
  kReturn, kTry, kWhile, kWith, kYield,

  kNumber, kText, kBytes,
  // An f-string is kFormat, its fields, kFormatEnd; a field is kField, an expression, kFieldEnd. Fields inside a format
  // specification follow the field that they specify.
  kFormat, kFormatEnd, kField, kFieldEnd,

  kOpenParenthesis, kCloseParenthesis, kOpenBracket, kCloseBracket, kOpenBrace, kCloseBrace,
  kComma, kColon, kSemicolon, kDot, kEllipsis, kArrow, kAssign, kAugmentedAssign, kWalrus,
  kPlus, kMinus, kTilde, kStar, kDoubleStar, kSlash, kAt, kBar,
  kOperator,    // other binary operators that bind tighter than a comparison
  kComparison,  // except `in`, `is`, `not in`, `is not`
  kKinds,
};

// Operators that follow an operand and take another one.
enum Joins : uint8_t { kNothing = 0, kArithmetic = 1, kPower = 2, kCompares = 4, kConnects = 8 };

struct KindTable {
  Joins joins[kKinds] = {};
  bool begins[kKinds] = {};  // whether it begins an expression, perhaps a starred one

  constexpr KindTable() {
    for (const Kind kind : {kPlus, kMinus, kStar, kSlash, kAt, kBar, kOperator}) joins[kind] = kArithmetic;
    joins[kDoubleStar] = kPower;
    for (const Kind kind : {kComparison, kIn, kIs, kNot}) joins[kind] = kCompares;  // `not` as in `not in`
    for (const Kind kind : {kAnd, kOr}) joins[kind] = kConnects;
    for (const Kind kind : {kName, kUnderscore, kMatch, kCase, kFalse, kNone, kTrue, kAwait, kLambda, kNot, kNumber, kText,
                            kBytes, kFormat, kOpenParenthesis, kOpenBracket, kOpenBrace, kEllipsis, kPlus, kMinus, kTilde,
                            kStar})
      begins[kind] = true;
  }
};

inline constexpr KindTable kKindTable;

constexpr bool is_name(Kind kind) { return kName <= kind && kind <= kCase; }

// The keywords by their letters, at most eight, packed into one number: an open-addressing hash table.
class Keywords {
 public:
  constexpr Keywords() {
    constexpr struct { const char* word; Kind kind; } kWords[] = {
        {"_", kUnderscore}, {"match", kMatch}, {"case", kCase}, {"False", kFalse}, {"None", kNone}, {"True", kTrue},
        {"and", kAnd}, {"as", kAs}, {"assert", kAssert}, {"async", kAsync}, {"await", kAwait}, {"break", kBreak},
        {"class", kClass}, {"continue", kContinue}, {"def", kDef}, {"del", kDel}, {"elif", kElif}, {"else", kElse},
        {"except", kExcept}, {"finally", kFinally}, {"for", kFor}, {"from", kFrom}, {"global", kGlobal}, {"if", kIf},
        {"import", kImport}, {"in", kIn}, {"is", kIs}, {"lambda", kLambda}, {"nonlocal", kNonlocal}, {"not", kNot},
        {"or", kOr}, {"pass", kPass}, {"raise", kRaise}, {"return", kReturn}, {"try", kTry}, {"while", kWhile},
        {"with", kWith}, {"yield", kYield},
    };
    for (const auto& [word, kind] : kWords) {
      uint64_t letters = 0;
      for (const char* at = word; *at; ++at) letters = letters << 8 | static_cast<uint8_t>(*at);
      unsigned slot = slot_of(letters);
      while (letters_[slot]) slot = (slot + 1) % kSlots;
      letters_[slot] = letters;
      kinds_[slot] = kind;
    }
  }

  constexpr Kind kind_of(uint64_t letters) const {
    unsigned slot = slot_of(letters);
    while (letters_[slot] && letters_[slot] != letters) slot = (slot + 1) % kSlots;
    return letters_[slot] ? kinds_[slot] : kName;
  }

 private:
  static constexpr unsigned kSlots = 256;

  static constexpr unsigned slot_of(uint64_t letters) { return letters * 0x9e3779b97f4a7c15ULL >> 56; }

  uint64_t letters_[kSlots] = {};
  Kind kinds_[kSlots] = {};
};

inline constexpr Keywords kKeywords;

}  // namespace megacoder::python
