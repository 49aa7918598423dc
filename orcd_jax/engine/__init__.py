"""Requests to tokens: the step loop, the scheduler, the compiled programs and everything between ids and text."""
