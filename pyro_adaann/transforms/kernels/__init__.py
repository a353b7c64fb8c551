"""What flows compute, as functions of tensors with gradients written out; no modules here."""
