# Everything a newcomer needs is "make demo" and "make test".
SHELL := /bin/bash
.DELETE_ON_ERROR:
# Recipes that need the servers run with DATABASE_URL and AMQP_URL as "up" wrote them.
env = . .dev/env &&

.PHONY: help
help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: ## start private PostgreSQL and RabbitMQ under .dev (or use DATABASE_URL / AMQP_URL)
	@go run ./internal/servers/dev up

.PHONY: down
down: ## stop them
	@go run ./internal/servers/dev down

.PHONY: status
status: ## say whether they serve, and where
	@go run ./internal/servers/dev status

.PHONY: demo
demo: ## orders become payments while the relay is killed; no card is charged twice
	@go build -o bin/ ./internal/servers/dev
	@bin/dev up & go build -o bin/ ./cmd/relay ./examples/payments && wait $$!
	@$(env) bin/payments demo -broker-control bin/dev

.PHONY: test
test: up ## run all tests, with the race detector, on the servers of "up"
	@go run ./internal/servers/dev compiler
	$(env) go test -race -timeout 15m ./...

.PHONY: chaos
chaos: up ## harm everything at random for DURATION=60s by SEED=1, and check what came of it
	@go build -tags failpoint -o bin/ ./internal/chaos
	@$(env) bin/chaos run -duration $(or $(DURATION),60s) -seed $(or $(SEED),1) -faults "$(FAULTS)"

# Scenarios that harm the broker need the private one.
.PHONY: bench
bench: up ## measure beside what limits it: SCENARIO=all OUT=bench/results.json ROUNDS=5
	@cd bench && go build -o ../bin/bench .
	@$(env) bin/bench -scenario $(or $(SCENARIO),all) -rounds $(or $(ROUNDS),5) -out $(or $(OUT),bench/results.json)

.PHONY: lint
lint: ## formatting, vet, staticcheck, tidy modules, import rules
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "not formatted: $$files"; exit 1; }
	go vet ./...
	go mod tidy -diff
	cd bench && go vet ./... && go mod tidy -diff
	go tool -modfile=tools/go.mod staticcheck ./...
	go test ./internal/layers
