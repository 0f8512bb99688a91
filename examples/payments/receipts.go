package main

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/inbox"
)

const receiptsTable = `CREATE TABLE receipts (id bigint GENERATED ALWAYS AS IDENTITY, order_id uuid NOT NULL, amount bigint NOT NULL, traceparent text NOT NULL)`

// runReceipts sends a receipt for each payment. It has the trace of the HTTP request that
// placed the order.
func runReceipts(ctx context.Context, db *pgxpool.Pool, amqpURL string) error {
	handler := inbox.JSON(func(ctx context.Context, tx pgx.Tx, m inbox.Message, order Order) error {
		inbox.Pipeline(tx).Queue("INSERT INTO receipts (order_id, amount, traceparent) VALUES ($1, $2, $3)",
			order.ID, order.Amount, m.Headers[traceparent])
		return nil
	})
	// Its only effects are in tx, so that messages may share one, and a round trip.
	consumer, err := inbox.NewConsumer(db, amqpURL, receiptsQueue, handler, inbox.Config{Setup: topology, Batch: 50})
	if err != nil {
		return err
	}
	return consumer.Run(ctx)
}
