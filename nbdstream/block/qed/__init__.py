"""The QED image format (qed_spec): layout, tables, image, check."""
