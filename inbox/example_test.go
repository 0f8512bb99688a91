package inbox_test

import (
	"context"
	"fmt"
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

// A record of Kafka, with any client. Its place in the log is its ID; where the producer has
// put one into a header, take that: a producer that sends again gives the copy a place of its
// own.
func ExampleHandle_kafka() {
	type record struct { // as kgo.Record has it
		Topic     string
		Partition int32
		Offset    int64
		Value     []byte
	}
	var commitOffset func(context.Context, record) error

	consume := func(ctx context.Context, r record) error {
		id := fmt.Sprintf("%s/%d/%d", r.Topic, r.Partition, r.Offset)
		_, err := inbox.Handle(ctx, db, "ledger", id, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO events (payload) VALUES ($1)", r.Value)
			return err
		})
		if err != nil {
			return err // poll it again: what is not committed comes again
		}
		return commitOffset(ctx, r) // first or duplicate
	}
	_ = consume
}

// A message of SQS, which comes again until it is deleted. A FIFO queue's producer sets a
// deduplication ID, which outlives the producer's own retries and is the better one.
func ExampleHandle_sqs() {
	type message struct { // as types.Message has it
		MessageId, Body, ReceiptHandle string
	}
	var deleteMessage func(ctx context.Context, receiptHandle string) error

	consume := func(ctx context.Context, m message) error {
		_, err := inbox.Handle(ctx, db, "ledger", m.MessageId, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO events (payload) VALUES ($1)", m.Body)
			return err
		})
		if err != nil {
			return err // it is visible again after the visibility timeout
		}
		return deleteMessage(ctx, m.ReceiptHandle) // first or duplicate
	}
	_ = consume
}
