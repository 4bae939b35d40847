"""What people type and read: options, quoting, progress, interrupts."""
