// The stacks of an LR parser that may read a text in several ways at once, as one graph of states.
//
// A version's stack is a chain of nodes down to the start. Versions share what is below their fork; where two merge,
// the node on top has several predecessors (Rekers, "Parser Generation for Interactive Environments", 1992, section
// 1.2). What was read between two nodes is not kept, only whether it is an extra, which may be anywhere, such as a
// comment. Nodes are reference-counted and reused.
#pragma once

#include <algorithm>
#include <memory>

#include "grammar.h"

namespace megacoder::grammar {

struct Node;

struct Link {
  Node* node;
  bool extra;  // what was read between the two nodes may be anywhere
};

struct Node {
  Link previous;  // null under the first node
  std::unique_ptr<std::vector<Link>> others;
  uint32_t position, references;  // position: up to where the text has been read
  State state;
};

struct Path {  // down from a node over some children
  Node* base;
  uint32_t end;                  // of the last child
  std::vector<uint32_t> extras;  // where each extra after it ends
};

class Stacks {
 public:
  Stacks() : paths_(kMostPaths) {}

  ~Stacks() {
    for (Node* block : blocks_) delete[] block;
  }

  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // Begins a text; `merges` limits the work.
  void start(int64_t merges) {
    is_overfull = false;
    merges_left_ = merges;
  }

  // Whether there were more paths than are followed; the result for the text may then have missed one.
  bool is_overfull = false;

  // A new node on top of `previous`; takes over the caller's reference to it.
  Node* make(Node* previous, State state, uint32_t position, bool extra) {
    if (!free_) grow();
    Node* node = free_;
    free_ = node->previous.node;
    node->previous = {previous, extra};
    node->position = position;
    node->references = 1;
    node->state = state;
    return node;
  }

  // A copy of `node` at a different place in the text.
  Node* copy(const Node& node, uint32_t position) {
    if (node.previous.node) ++node.previous.node->references;
    Node* made = make(node.previous.node, node.state, position, node.previous.extra);
    if (node.others) {
      made->others = std::make_unique<std::vector<Link>>(*node.others);
      for (const Link& link : *made->others) ++link.node->references;
    }
    return made;
  }

  void release(Node* node) {
    for (;;) {
      while (node && --node->references == 0) {
        if (node->others) {
          for (const Link& link : *node->others) released_.push_back(link.node);
          node->others.reset();
        }
        Node* previous = node->previous.node;
        node->previous.node = free_;
        free_ = node;
        node = previous;
      }
      if (released_.empty()) return;
      node = released_.back();
      released_.pop_back();
    }
  }

  // Collects every path down from `top` over `count` children; extras under the last child are not popped.
  size_t collect(Node* top, uint32_t count) {
    paths_[0].extras.clear();
    Node* node = top;
    uint32_t left = count;
    for (; left && !node->others; node = node->previous.node) step(paths_[0], *node, node->previous.extra, count, left);
    if (left == 0) {
      if (count == 0) paths_[0].end = top->position;
      paths_[0].base = node;
      return 1;
    }
    num_paths_ = 0;
    branch(node, Path(paths_[0]), count, left, 0);
    return num_paths_;
  }

  const Path& path(size_t index) const { return paths_[index]; }

  // Adds the stacks under `other`, which is at the same place and in the same state, to those under `node`.
  void merge(Node* node, const Node& other, int depth = 0) {
    add(node, other.previous, depth);
    if (!other.others) return;
    for (const Link& link : *other.others) add(node, link, depth);
  }

 private:
  static constexpr size_t kMostLinks = 8, kMostPaths = 32;  // tree-sitter drops any over 8 and 64
  static constexpr size_t kBlock = 1024;
  static constexpr int kDeepest = 1000;  // levels of recursion

  void grow() {
    Node* block = new Node[kBlock];
    blocks_.push_back(block);
    for (size_t i = 0; i < kBlock; ++i) {
      block[i].previous.node = free_;
      free_ = block + i;
    }
  }

  void branch(Node* node, Path path, uint32_t count, uint32_t left, int depth) {
    for (; left && !node->others; node = node->previous.node) step(path, *node, node->previous.extra, count, left);
    is_overfull |= (left == 0 && num_paths_ == kMostPaths) || depth > kDeepest;
    if (is_overfull) return;
    if (left == 0) {
      path.base = node;
      paths_[num_paths_++] = std::move(path);
      return;
    }
    const auto follow = [&](const Link& link) {
      Path further = path;
      uint32_t remaining = left;
      step(further, *node, link.extra, count, remaining);
      branch(link.node, std::move(further), count, remaining, depth + 1);
    };
    follow(node->previous);
    for (const Link& link : *node->others) follow(link);
  }

  static void step(Path& path, const Node& node, bool is_extra, uint32_t count, uint32_t& left) {
    if (!is_extra) {
      if (left-- == count) {
        path.end = node.position;
        std::reverse(path.extras.begin(), path.extras.end());
      }
    } else if (left == count) {
      path.extras.push_back(node.position);
    }
  }

  void add(Node* node, const Link& link, int depth) {
    is_overfull |= --merges_left_ < 0 || depth > kDeepest;
    if (is_overfull || link.node == node || !link.node || !node->previous.node) return;
    if (is_same(node->previous, link, depth)) return;
    if (!node->others) node->others = std::make_unique<std::vector<Link>>();
    for (const Link& known : *node->others)
      if (is_same(known, link, depth)) return;
    is_overfull |= node->others->size() + 1 == kMostLinks;
    if (is_overfull) return;
    ++link.node->references;
    node->others->push_back(link);
  }

  // Whether `link` adds nothing to `known`, after merging their nodes if these are at the same place and state.
  bool is_same(const Link& known, const Link& link, int depth) {
    if (known.extra != link.extra) return false;
    if (known.node == link.node) return true;
    if (known.node->state != link.node->state || known.node->position != link.node->position) return false;
    merge(known.node, *link.node, depth + 1);
    return true;
  }

  std::vector<Node*> blocks_;
  std::vector<Node*> released_;  // predecessors of freed nodes whose references are still to be decremented
  std::vector<Path> paths_;
  Node* free_ = nullptr;
  size_t num_paths_ = 0;
  int64_t merges_left_ = 0;
};

}  // namespace megacoder::grammar
