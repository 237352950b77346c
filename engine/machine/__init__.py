"""What this computer has: processor, memory, graphics card, how fast they are, and what their errors mean."""
