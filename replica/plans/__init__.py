"""Recovery plans: many VMs started elsewhere, tried, or brought home, in a written order (docs/plans.md)."""
