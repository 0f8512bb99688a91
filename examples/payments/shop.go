package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sync/errgroup"
)

// shop places orders through HTTP. Every 40th is over the credit limit, and the
// message of every 100th is published once more by hand.
type shop struct {
	url     string
	demo    *demo
	repeats chan repeat // room for all of them: the broker's outages hold no order up

	mu       sync.Mutex
	declined []Order
}

type repeat struct {
	order     Order
	messageID string
}

const (
	declineEvery = 40
	repeatEvery  = 100
)

// place returns when as many orders as the demo wants have been accepted.
func (s *shop) place(ctx context.Context) error {
	turns := make(chan int)
	s.repeats = make(chan repeat, s.demo.orders/repeatEvery)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(turns)
		pace := time.NewTicker(time.Second / time.Duration(s.demo.rate))
		defer pace.Stop()
		for n := 1; n <= s.demo.orders; n++ {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-pace.C:
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case turns <- n:
			}
		}
		return nil
	})
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: s.demo.clients}}
	defer client.CloseIdleConnections()
	group.Go(func() error { return s.repeatAll(ctx, s.demo.orders/repeatEvery) })
	for range s.demo.clients {
		group.Go(func() error {
			for n := range turns {
				if err := s.turn(ctx, client, n); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func (s *shop) turn(ctx context.Context, client *http.Client, n int) error {
	if n%declineEvery == 0 {
		dear := Order{ID: uuid.New(), Amount: creditLimit + 1}
		if _, err := s.post(ctx, client, dear, http.StatusUnprocessableEntity); err != nil {
			return err
		}
		s.mu.Lock()
		s.declined = append(s.declined, dear)
		s.mu.Unlock()
	}
	order := Order{ID: uuid.New(), Amount: 1 + rand.Int64N(creditLimit)}
	messageID, err := s.post(ctx, client, order, http.StatusCreated)
	if err != nil {
		return err
	}
	s.demo.placed.Add(1)
	if n%repeatEvery == 0 {
		s.repeats <- repeat{order, messageID}
	}
	return nil
}

func (s *shop) post(ctx context.Context, client *http.Client, order Order, want int) (messageID string, err error) {
	body, err := json.Marshal(order)
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	request.Header.Set(traceparent, traceOf(order.ID))
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if response.StatusCode != want {
		return "", fmt.Errorf("place order %s: %s: %s", order.ID, response.Status, answer)
	}
	if want != http.StatusCreated {
		return "", nil
	}
	var placed struct {
		MessageID string `json:"message_id"`
	}
	return placed.MessageID, json.Unmarshal(answer, &placed)
}

// traceOf is the trace context with which an order is placed.
func traceOf(order uuid.UUID) string { return fmt.Sprintf("00-%x-%x-01", order[:], order[:8]) }

// repeatAll is the operator who is not sure whether n messages went out, and
// publishes them by hand. While the broker is away he tries again.
func (s *shop) repeatAll(ctx context.Context, n int) error {
	for range n {
		var r repeat
		select {
		case r = <-s.repeats:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		payload, err := json.Marshal(r.order)
		if err != nil {
			return err
		}
		message := amqp.Publishing{MessageId: r.messageID, Type: "order.placed", ContentType: "application/json", DeliveryMode: amqp.Persistent, Body: payload,
			Headers: amqp.Table{traceparent: traceOf(r.order.ID)}}
		var last error
		err = await(ctx, settleLimit, "publish by hand", func() bool {
			last = publish(ctx, s.demo.amqpURL, message)
			return last == nil
		})
		if err != nil {
			return fmt.Errorf("%w: %w", err, last)
		}
		s.demo.faults.repeated.Add(1)
	}
	return nil
}

func publish(ctx context.Context, amqpURL string, message amqp.Publishing) error {
	conn, err := amqp.Dial(amqpURL)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := ch.Confirm(false); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	confirm, err := ch.PublishWithDeferredConfirmWithContext(ctx, exchange, "order.placed", true, false, message)
	if err != nil {
		return err
	}
	confirmed, err := confirm.WaitContext(ctx)
	if err == nil && !confirmed {
		err = fmt.Errorf("message %s was not confirmed", message.MessageId)
	}
	return err
}
