"""The judge: a catalogue of invariants, a shadow ledger, and the auditor that the simulator talks to."""
