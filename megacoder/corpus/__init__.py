"""Repositories in, training documents out: filters, exact dedup, dependency order, samples, and a reason per drop."""
