PROTO_DIR := proto/cluster
.PHONY: proto
proto: ## Generate the wire package from proto/
	.venv/bin/python -m grpc_tools.protoc -Inodeservice/wire=$(PROTO_DIR) --python_out=. --pyi_out=. --grpc_python_out=. nodeservice/wire/master_worker.proto
