"""Speed of models under attention policies, and of servers, under one workload; see README.md."""
