package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/outbox"
)

const ordersTable = `CREATE TABLE orders (id uuid PRIMARY KEY, amount bigint NOT NULL)`

// Order is a row of the order service, and the payload of "order.placed".
type Order struct {
	ID     uuid.UUID `json:"id"`
	Amount int64     `json:"amount"` // cents
}

// creditLimit is the most that one order may cost, in cents.
const creditLimit = 1_000_00

var errDeclined = errors.New("declined: over the credit limit")

// placeOrder saves the order and the message about it, both or neither. It returns
// the message's ID.
func placeOrder(ctx context.Context, db *pgxpool.Pool, order Order, trace string) (uuid.UUID, error) {
	messageID := outbox.NewID()
	payload, err := json.Marshal(order)
	if err != nil {
		return messageID, err
	}
	return messageID, pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "INSERT INTO orders (id, amount) VALUES ($1, $2)", order.ID, order.Amount); err != nil {
			return err
		}
		err := outbox.Write(ctx, tx, outbox.Message{
			ID:         messageID,
			Exchange:   exchange,
			RoutingKey: "order.placed",
			Key:        order.ID.String(),
			Type:       "order.placed",
			Headers:    map[string]string{traceparent: trace},
			Payload:    payload,
		})
		if err != nil {
			return err
		}
		// A check comes first, as a rule. Here it comes last, so that the message of
		// an order that is declined has been written, and must vanish with it.
		if order.Amount > creditLimit {
			return errDeclined
		}
		return nil
	})
}

// runOrders serves POST /orders on LISTEN until ctx ends. The client chooses the
// order's ID, so that it can ask again when an answer was lost.
func runOrders(ctx context.Context, db *pgxpool.Pool, _ string) error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		var order Order
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&order); err != nil || order.ID == uuid.Nil || order.Amount <= 0 {
			http.Error(w, "want an id (UUID) and an amount in cents", http.StatusBadRequest)
			return
		}
		messageID, err := placeOrder(r.Context(), db, order, r.Header.Get(traceparent))
		var pgErr *pgconn.PgError
		switch {
		case err == nil:
			w.WriteHeader(http.StatusCreated)
			json.NewEncoder(w).Encode(map[string]any{"message_id": messageID})
		case errors.Is(err, errDeclined):
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		case errors.As(err, &pgErr) && pgErr.Code == "23505": // placed before
			w.WriteHeader(http.StatusOK)
		default:
			http.Error(w, "try again", http.StatusServiceUnavailable)
		}
	})
	server := &http.Server{Addr: os.Getenv("LISTEN"), Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- server.Shutdown(ctx)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}
