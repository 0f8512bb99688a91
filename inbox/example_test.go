package inbox_test

import (
	"context"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
)

var db *pgxpool.Pool

func ExampleNewConsumer() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	type Order struct {
		ID     string `json:"id"`
		Amount int64  `json:"amount"`
	}
	charge := func(ctx context.Context, tx pgx.Tx, m inbox.Message, order Order) error {
		_, err := tx.Exec(ctx, "INSERT INTO charges (order_id, amount) VALUES ($1, $2)", order.ID, order.Amount)
		return err
	}
	consumer, err := inbox.NewConsumer(db, "amqp://localhost", "payments", inbox.JSON(charge), inbox.Config{
		Setup: func(ch *amqp.Channel) error {
			if err := ch.ExchangeDeclare("orders", "topic", true, false, false, false, nil); err != nil {
				return err
			}
			queue := amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": -1}
			if _, err := ch.QueueDeclare("payments", true, false, false, false, queue); err != nil {
				return err
			}
			return ch.QueueBind("payments", "order.*", "orders", false, nil)
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := consumer.Run(ctx); err != nil {
		log.Fatal(err)
	}
}

// In a transaction of your own.
func ExampleRecord() {
	receive := func(ctx context.Context, messageID string, amount int64) error {
		return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			first, err := inbox.Record(ctx, tx, "ledger", messageID)
			if err != nil || !first {
				return err // a duplicate changes nothing
			}
			_, err = tx.Exec(ctx, "UPDATE accounts SET balance = balance + $1", amount)
			return err
		})
	}
	_ = receive
}

// A webhook, which its sender repeats until it is answered.
func ExampleHandle() {
	http.HandleFunc("POST /webhook", func(w http.ResponseWriter, r *http.Request) {
		payload, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			http.Error(w, "body", http.StatusBadRequest)
			return
		}
		_, err = inbox.Handle(r.Context(), db, "webhook", r.Header.Get("Event-Id"), func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO events (payload) VALUES ($1)", payload)
			return err
		})
		if err != nil { // ErrCommitUnknown too: it comes again with the same ID
			http.Error(w, "try again", http.StatusServiceUnavailable)
		}
	})
}
