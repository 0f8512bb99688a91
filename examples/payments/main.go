// Command payments is a small shop: an order service that saves orders and tells
// of them, a ledger service that charges for each order once and tells of that, and a
// service that sends a receipt for each charge. Between them stand txbox's outbox, relay
// and inbox, and RabbitMQ.
//
//	payments orders   the order service: POST /orders
//	payments ledger   the ledger: charges with an inbox
//	payments receipts the receipts: a receipt for each charge, in batches
//	payments naive    the consumer that everybody writes first: charges without one
//	payments demo     all of them and their relays, 10,000 orders, and faults
//
// Read orders.go and ledger.go first: they are what a user of txbox writes.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5/pgxpool"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "demo" {
		return runDemo(ctx, args[1:])
	}
	service := map[string]func(context.Context, *pgxpool.Pool, string) error{
		"orders": runOrders, "ledger": runLedger, "receipts": runReceipts, "naive": runNaive,
	}
	if len(args) != 1 || service[args[0]] == nil {
		return errors.New("usage: payments orders|ledger|receipts|naive|demo")
	}
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	defer db.Close()
	return service[args[0]](ctx, db, os.Getenv("AMQP_URL"))
}
