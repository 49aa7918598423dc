"""What lies in device memory: what it needs, the proof of its bytes, a seal over it, the policy that keeps it there."""
