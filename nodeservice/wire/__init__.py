"""The wire contract: code generated from `proto/cluster/master_worker.proto` by `make proto`. Never edited by hand."""
