package outbox_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/outbox"
)

var (
	ctx context.Context
	db  *pgxpool.Pool
)

func Example() {
	type Order struct {
		ID     string `json:"id"`
		Amount int64  `json:"amount"`
	}
	placeOrder := func(ctx context.Context, db *pgxpool.Pool, order Order) error {
		return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO orders (id, amount) VALUES ($1, $2)", order.ID, order.Amount)
			if err != nil {
				return err
			}
			payload, err := json.Marshal(order)
			if err != nil {
				return err
			}
			return outbox.Write(ctx, tx, outbox.Message{
				Exchange:   "orders",
				RoutingKey: "order.placed",
				Key:        order.ID,
				Payload:    payload,
			})
		})
	}
	_ = placeOrder
}

// Business change and message in one round trip, COMMIT included.
func ExampleQueue() {
	batch := &pgx.Batch{}
	batch.BeginTx(pgx.TxOptions{})
	batch.Queue("UPDATE orders SET state = 'paid' WHERE id = $1", "order-42")
	err := outbox.Queue(ctx, batch, outbox.Message{Exchange: "orders", RoutingKey: "order.paid", Key: "order-42"})
	if err != nil {
		return
	}
	results := db.SendBatch(ctx, batch)
	if err := results.Close(); err != nil {
		return // begun or not, the transaction is rolled back below
	}
	if err := results.Tx().Commit(ctx); err != nil {
		return
	}
}

func ExampleWriteSQL() {
	var tx *sql.Tx // of any PostgreSQL driver
	err := outbox.WriteSQL(ctx, tx, outbox.Message{
		RoutingKey: "reminders", // the default exchange: the name of a queue
		NotBefore:  time.Now().Add(24 * time.Hour),
		Payload:    []byte(`{"order":"order-42"}`),
	})
	if err != nil {
		return // and roll back
	}
}

func ExampleWriter() {
	writer := outbox.Writer{
		Schema:     "billing_txbox",
		MaxPayload: 64 << 10,
		Inject: func(ctx context.Context, headers map[string]string) {
			headers["tenant"] = "acme"
		},
	}
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		return writer.Write(ctx, tx, outbox.Message{Exchange: "bills", RoutingKey: "bill.sent"})
	})
	if err != nil {
		return
	}
}
